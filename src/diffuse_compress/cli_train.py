"""``diffuse-compress train``, which ``accelerate launch -m diffuse_compress.train_qat`` runs on several processes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.apply_training import mark_trained
from diffuse_compress.components import is_pipeline
from diffuse_compress.errors import ConfigError
from diffuse_compress.pipeline_call import named_arguments
from diffuse_compress.skeleton import default_dtype, load, local_folder
from diffuse_compress.training.batches import TrainingData
from diffuse_compress.training.config import LossSpace, QVGenConfig, TrainingMethod
from diffuse_compress.training.media import media_in
from diffuse_compress.training.noising import Density
from diffuse_compress.training.options import LOSSES, LR_SCHEDULERS, TEACHERS, TrainerOptions
from diffuse_compress.training.processes import refuse_launcher
from diffuse_compress.training.setup import component_of, make_accelerator
from diffuse_compress.training.shards import INDEX
from diffuse_compress.training.sources import (
    encode_media,
    load_data,
    own_items,
    record_calls,
    save_data,
    synthetic_latents,
    training_data,
)
from diffuse_compress.training.trainer import QATTrainer

__all__ = ["add_train"]

_EXAMPLES = """examples:
  # prompts alone: the pipeline's own trajectories are what is learned on
  diffuse-compress train --pretrained_model_name_or_path ./wan --scheme w4a4 --prompts prompts.txt \\
      --num_inference_steps 30 --max_train_steps 2000 --output_dir ./wan-w4a4

  # clips with captions (metadata.csv, or 1.mp4 with 1.txt), on eight GPUs; the same command goes on after a crash
  accelerate launch --num_processes 8 -m diffuse_compress.train_qat --pretrained_model_name_or_path ./wan \\
      --train_data_dir ./clips --height 480 --width 832 --num_frames 49 --max_train_steps 2667 \\
      --gradient_checkpointing --checkpointing_steps 200 --resume_from_checkpoint latest --output_dir ./wan-w4a4

what comes out loads with plain diffusers, after `import diffuse_compress`.
"""
_SIZE = ("height", "width", "num_frames", "num_inference_steps")


def add_train(verbs: Any) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "train",
        help="quantization-aware training of a pipeline's denoiser, or of a language model",
        description="Lets a quantized student learn from its dense self, converts it, and writes it with "
        "save_pretrained. Arguments are called as in diffusers' training scripts.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(verb)
    _add_data(verb)
    _add_method(verb)
    _add_optimization(verb)
    _add_run(verb)
    verb.set_defaults(run=_train)


def _add_model(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, metavar="PATH_OR_REPO")
    group.add_argument("--revision", help="of a repository: branch, tag or commit")
    group.add_argument("--component", help="which denoiser, where a pipeline has several")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    group.add_argument("--device", help="default: the GPU of this process, or the CPU")


def _add_data(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("data", "one of these; without, prompts of this package")
    group.add_argument("--prompts", metavar="FILE", help="one prompt (of a language model: text) in a line")
    group.add_argument(
        "--train_data_dir",
        "--instance_data_root",
        metavar="DIR",
        help="pictures or clips with captions, or latents and calls that were stored",
    )
    group.add_argument("--synthetic", type=int, metavar="N", help="N latents of noise, to try a training out")
    group.add_argument("--caption_column", help="of the folder's metadata")
    group.add_argument("--video_column", "--image_column", dest="media_column", help="of the folder's metadata")
    group.add_argument("--caption_dropout", type=float, default=0.0, help="share of captions left out")
    group.add_argument("--num_samples", type=int, help="recorded calls for --prompts (default: 8 for each)")
    for name in _SIZE:
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--timestep_density", default="uniform", choices=[d.value for d in Density])
    group.add_argument("--held_out", type=int, default=0, help="items whose loss is logged, and not trained on")


def _add_method(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("method", "None of these means QVGenConfig's default")
    group.add_argument("--config", metavar="FILE", help="QVGenConfig as JSON; arguments given here go before it")
    group.add_argument("--scheme", help='"w4a4", "w4a16", "w3a3", ...')
    group.add_argument("--method", choices=[method.value for method in TrainingMethod])
    group.add_argument("--phi_rank", type=int)
    group.add_argument("--decay_fraction", type=float)
    group.add_argument("--no_decay", dest="decay", action="store_const", const=False, help="keep the branch")
    group.add_argument("--clip_groups", type=int)
    group.add_argument("--timestep_range", type=float, nargs=2, metavar=("LOW", "HIGH"))
    group.add_argument("--quantize_all", action="store_const", const=True)
    group.add_argument("--modules_to_not_convert", nargs="+", metavar="PATTERN")
    group.add_argument("--loss_space", choices=[space.value for space in LossSpace])
    group.add_argument("--loss", default="mse", choices=LOSSES)
    group.add_argument("--teacher", default="copy", choices=TEACHERS)


def _add_optimization(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("optimization", "None of these means QVGenConfig's default")
    for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "seed"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--num_train_epochs", type=int, help="instead of --max_train_steps")
    for name in ("learning_rate", "clip_learning_rate", "max_grad_norm", "ema_decay"):
        group.add_argument(f"--{name}", type=float)
    group.add_argument("--scale_lr", action="store_true", help="times processes, batch size and accumulation")
    group.add_argument("--lr_warmup_steps", type=int)
    group.add_argument("--lr_scheduler", default="cosine", choices=LR_SCHEDULERS)
    group.add_argument("--lr_num_cycles", type=int, default=1, help="of cosine_with_restarts")
    for name, kind in (("adam_beta1", float), ("adam_beta2", float), ("adam_epsilon", float)):
        group.add_argument(f"--{name}", type=kind)
    group.add_argument("--adam_weight_decay", type=float)
    group.add_argument(
        "--use_8bit_adam", action="store_true", help="by bitsandbytes on a GPU where installed, else torchao"
    )
    group.add_argument("--use_ema", action="store_true", help="an average of the weights, of --ema_decay 0.9999")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    group.add_argument("--gradient_checkpointing", action="store_const", const=True)
    group.add_argument("--allow_tf32", action="store_true")


def _add_run(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("run")
    group.add_argument("--output_dir", required=True, metavar="DIR", help="for checkpoints and what comes out")
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group.add_argument("--checkpoints_total_limit", type=int)
    group.add_argument("--resume_from_checkpoint", metavar="latest|DIR")
    group.add_argument("--report_to", help='"tensorboard", "wandb", ... or "all"')
    group.add_argument("--tracker_name", default="diffuse-compress-train")
    group.add_argument("--logging_dir", metavar="DIR", help="for trackers; default: --output_dir")
    group.add_argument("--spectrum_steps", type=int, help="steps between two logs of the branch's singular values")
    group.add_argument("--validation_prompt", action="append", default=[], help="repeat for more")
    group.add_argument("--num_validation_videos", "--num_validation_images", type=int, default=1, help="of each prompt")
    group.add_argument("--validation_steps", type=int)
    group.add_argument("--validation_epochs", type=int, help="instead of --validation_steps")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id", help="default: the name of --output_dir")
    group.add_argument("--hub_token", help="default: that of `hf auth login`, or of HF_TOKEN")
    group.add_argument("--json", action="store_true", help="print one JSON object at the end and nothing else")


# --- running ------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> None:
    if args.push_to_hub and not (args.hub_model_id or Path(args.output_dir).name):
        raise ConfigError("train: --push_to_hub needs --hub_model_id.")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    refuse_launcher()
    accelerator = _accelerator(args)
    config = _config(args, 1 if accelerator is None else accelerator.num_processes)
    options = _options(args)
    folder = local_folder(args.pretrained_model_name_or_path, weights=True, revision=args.revision)
    device = args.device or (str(accelerator.device) if accelerator is not None else None)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = load(folder, default_dtype(args.dtype, folder, device), device)
    component = component_of(target, args.component)
    data = _data(args, target, component, config, accelerator)
    if args.num_train_epochs is not None:
        steps = _steps(args.num_train_epochs, args, config, len(data), accelerator)
        config = dataclasses.replace(config, max_train_steps=steps)
    if args.validation_epochs is not None:
        every = _steps(args.validation_epochs, args, config, len(data), accelerator)
        options = dataclasses.replace(options, validation_steps=every)
    trainer = QATTrainer(target, config, data, options=options, component=component, accelerator=accelerator)
    result = trainer.train()
    trainer.convert()
    assert trainer.prepared is not None
    mark_trained(trainer.prepared)
    pushed = None
    if accelerator is None or accelerator.is_main_process:
        target.save_pretrained(args.output_dir)
        if args.push_to_hub:
            name = args.hub_model_id or Path(args.output_dir).name
            pushed = str(target.push_to_hub(name, token=args.hub_token))
        _tell(args, result, pushed)
    if accelerator is not None:
        accelerator.wait_for_everyone()
        accelerator.end_training()


def _tell(args: argparse.Namespace, result: Any, pushed: str | None) -> None:
    if args.json:
        found = {"out": args.output_dir, "pushed": pushed, "steps": result.steps}
        print(json.dumps({**found, "losses": result.losses.tolist(), "validation": list(result.validation)}))
        return
    print(result)
    for entry in result.validation:
        print(", ".join(f"{name} {value:g}" for name, value in entry.items()))
    print(f"trained: {args.output_dir}", *([f"pushed: {pushed}"] if pushed else []), sep="\n")


def _accelerator(args: argparse.Namespace) -> Any:
    """Where a launcher has started processes, or trackers are wanted."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not args.report_to:
        return None
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    return make_accelerator(args.report_to, args.logging_dir or args.output_dir, cpu=cpu)


def _config(args: argparse.Namespace, processes: int) -> QVGenConfig:
    given: dict[str, Any] = {}
    if args.config:
        try:
            given = json.loads(Path(args.config).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {args.config}: not a readable QVGenConfig ({error}).") from error
    names = {each.name for each in dataclasses.fields(QVGenConfig)}
    given |= {n: v for n, v in vars(args).items() if n in names and v is not None}
    if given.get("mixed_precision") == "no":
        given["mixed_precision"] = None
    base = QVGenConfig.from_dict(given)
    changes: dict[str, Any] = {}
    if args.use_ema and base.ema_decay is None:
        changes["ema_decay"] = 0.9999
    if args.adam_beta1 is not None or args.adam_beta2 is not None:
        one, two = base.betas
        changes["betas"] = (args.adam_beta1 or one, args.adam_beta2 or two)
    for name, value in (("eps", args.adam_epsilon), ("weight_decay", args.adam_weight_decay)):
        if value is not None:
            changes[name] = value
    if args.lr_warmup_steps is not None:
        changes["warmup_fraction"] = min(args.lr_warmup_steps / base.max_train_steps, 0.999)
    if args.scale_lr:
        changes["learning_rate"] = (
            base.learning_rate * processes * base.train_batch_size * base.gradient_accumulation_steps
        )
    return dataclasses.replace(base, **changes)


def _steps(epochs: int, args: argparse.Namespace, config: QVGenConfig, items: int, accelerator: Any) -> int:
    processes = 1 if accelerator is None else accelerator.num_processes
    size = processes * config.train_batch_size * config.gradient_accumulation_steps
    return epochs * -(-max(1, items - args.held_out) // size)


def _options(args: argparse.Namespace) -> TrainerOptions:
    return TrainerOptions(
        output_dir=args.output_dir,
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        resume_from_checkpoint=args.resume_from_checkpoint,
        report_to=args.report_to,
        tracker_name=args.tracker_name,
        teacher=args.teacher,
        loss=args.loss,
        optimizer_8bit=args.use_8bit_adam,
        spectrum_steps=args.spectrum_steps,
        lr_scheduler=args.lr_scheduler,
        lr_num_cycles=args.lr_num_cycles,
        held_out=args.held_out,
        validation_steps=args.validation_steps,
        validation_prompts=tuple(p for p in args.validation_prompt for _ in range(args.num_validation_videos)),
        validation_arguments=_sizes(args),
    )


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(args, name) for name in _SIZE if getattr(args, name) is not None}


def _data(args: argparse.Namespace, target: Any, component: str, config: QVGenConfig, accelerator: Any) -> TrainingData:
    """Made once, by the first process, and kept beside the checkpoints."""
    given = [args.prompts, args.train_data_dir, args.synthetic]
    if config.method is TrainingMethod.LSQ and is_pipeline(target) and args.train_data_dir is None:
        if args.synthetic is None:
            raise ConfigError(
                "train: --method lsq learns what the data say, and trajectories of --prompts say nothing. Give "
                "--train_data_dir; or learn of the teacher: --method kd."
            )
    if sum(value is not None for value in given) > 1:
        raise ConfigError("train: give one of --prompts, --train_data_dir and --synthetic.")
    pipe = target if is_pipeline(target) else None
    if args.train_data_dir and (Path(args.train_data_dir) / INDEX).is_file():
        return training_data(target, component, args.train_data_dir, space=config.loss_space, seed=config.seed)
    keys = ("pretrained_model_name_or_path", "revision", "prompts", "train_data_dir", "synthetic", "num_samples")
    keys += ("caption_column", "media_column", "caption_dropout", "timestep_density", *_SIZE)
    asked = repr([*(getattr(args, key) for key in keys), component, config.seed, config.loss_space.value])
    if args.prompts:
        asked += Path(args.prompts).read_text(encoding="utf-8")
    folder = Path(args.output_dir) / f"data-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    if not (folder / INDEX).is_file() and (accelerator is None or accelerator.is_main_process):
        made = _made(args, target, component, config, folder)
        if not (folder / INDEX).is_file():
            save_data(made, folder)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    density = Density(args.timestep_density)
    return load_data(folder, pipe=pipe, component=component, space=config.loss_space, density=density)


def _made(args: argparse.Namespace, target: Any, component: str, config: QVGenConfig, folder: Path) -> TrainingData:
    """The data; pictures and clips are in ``folder`` then, encoded one after the other."""
    lines = None
    if args.prompts:
        lines = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not is_pipeline(target):
        return training_data(target, component, lines, space=config.loss_space, seed=config.seed)
    common: dict[str, Any] = {"component": component, "space": config.loss_space, "seed": config.seed}
    sizes: dict[str, Any] = {name: value for name, value in _sizes(args).items() if name in named_arguments(target)}
    if args.train_data_dir:
        sizes.pop("num_inference_steps", None)
        media = media_in(args.train_data_dir, args.caption_column, args.media_column)
        density = Density(args.timestep_density)
        given = {"caption_dropout": args.caption_dropout, "density": density, "folder": folder}
        return encode_media(target, media, **given, **common, **sizes)
    if args.synthetic is not None:
        return synthetic_latents(target, args.synthetic, **common, **sizes)
    if lines is None:
        lines = own_items(target)
    return record_calls(target, lines, num_samples=args.num_samples, **common, **sizes)
