"""Models and the denoising loop: encode -> denoise -> decode -> write.

Reading order: request (what a clip is), checkpoint (which model), adapters (what differs between models),
loading, denoise (the loop), render (one clip from prompt to frames), gang (the same on several ranks), sharding,
parallel_decode, video (frames to MP4).
"""
