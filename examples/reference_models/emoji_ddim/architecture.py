"""The untrained components of the pipeline. Every size that was chosen by hand stands in this file.

Budget: at 16 bits all components together must stay below 3 MiB.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DModel

PICTURE_SIZE = 32


def build_unet() -> UNet2DModel:
    """Convolutions at 32 pixels; convolutions and attention (2 heads of 32) at 16 and 8.

    Groups of 4 or 8 channels: the usual 32 groups would make an instance norm of the first level,
    which forgets colours.
    """
    unet = UNet2DModel(
        sample_size=PICTURE_SIZE,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_scheduler() -> DDIMScheduler:
    """The noise levels of DDPM (Ho et al. 2020, arXiv 2006.11239), sampled from the last one down."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=True,
        timestep_spacing="trailing",
    )
