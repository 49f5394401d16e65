"""Why layers were computed that a table might have served, and what to do about it."""

from __future__ import annotations

from diffuse_compress.runtime.stats import Reason

__all__ = [
    "ADAPTED",
    "CAPTURED",
    "CHANGING",
    "DOUBTED",
    "FAILED",
    "NOT_TRACKED",
    "NO_BATCH",
    "OFFLOADED",
    "OTHER_PROCESSOR",
    "OTHER_SHAPE",
    "PER_TOKEN",
    "TRAINING",
    "TWO_THREADS",
    "UNKNOWN_FORM",
]

UNKNOWN_FORM = Reason(
    "the model was given another timestep than the schedule's, in no form that is known",
    "pass the elements of scheduler.timesteps, or t / num_train_timesteps",
)
PER_TOKEN = Reason(
    "every token has a timestep of its own",
    "nothing: these calls are computed (image-to-video with expanded timesteps, diffusion forcing)",
)
OTHER_SHAPE = Reason(
    "a layer was called with another number of rows than its table has",
    "nothing, if the model joins several timesteps or pictures in one batch; else please report it",
)
TRAINING = Reason("the model is in training mode", "call model.eval()")
TWO_THREADS = Reason(
    "two threads run the model at the same time",
    "give each thread a model of its own, or let them take turns",
)
CAPTURED = Reason(
    "a CUDA graph of the whole model is being captured",
    "capture its blocks instead (compile_repeated_blocks, mode='reduce-overhead')",
)
NOT_TRACKED = Reason("the model's place in the loop is not followed", "attach the table again")
NO_BATCH = Reason("the model was called without a sample tensor", "pass the sample as a tensor [batch, ...]")
OFFLOADED = Reason(
    "input scales are not loaded before the call, so that those of all steps were used",
    "use pipe.enable_model_cpu_offload(), or group offloading without offload_to_disk_path=",
)
ADAPTED = Reason(
    "an adapter (LoRA) is on the layer, or on one that it depends on",
    "merge it: pipe.fuse_lora() and then pipe.unload_lora_weights()",
)
OTHER_PROCESSOR = Reason(
    "an attention processor is set that the text's keys and values are not known of",
    "nothing; or restore the stock one with model.set_default_attn_processor()",
)
CHANGING = Reason(
    "the conditions are others in every step",
    "pass the same tensors in every step, where they are the same",
)
FAILED = Reason("the table could not be built; the log says why", "report it, with the log's message")
DOUBTED = Reason(
    "a timestep on the device was not the schedule's",
    "pass the elements of scheduler.timesteps, and one timestep for all samples of a batch",
)
