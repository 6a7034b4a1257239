"""The real code at its real size on tensors without memory: what a clip takes of a GPU, told where there is none.

Reading order: published (configurations of the named checkpoints), operations (their arithmetic in closed form),
forecast (memory and work of any size and layout, from a table); fake_gpu, stage and measure make that table.
"""
