"""Models and the denoising loop: encode -> denoise -> decode -> write. Knows no batch, no output folder and no Ray.

Reading order: request (what a clip is), adapters (what differs between models), loading, denoise (the loop), render
(one clip from prompt to frames), gang (the same on several ranks); caches, parallel, resume, media as needed.
"""
