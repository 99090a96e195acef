"""Which of DeepSpeed's own settings a `deepspeed:` block may hold: passed through, ours to set, or against a promise.

Every setting of DeepSpeed 0.19.8 stands in one of the tables; a test fails, with its name, on one that a newer one has
added. Below the top, only `zero_optimization` and its offload blocks are sorted; DeepSpeed reads the others itself.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

from cpt.config.faults import Fault, nearest


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PASSED = _names(
    """
    aio comet comms_logger communication_data_type csv_monitor data_types disable_allgather disable_python_gc
    dump_state flops_profiler gradient_predivide_factor log_level memory_breakdown prescale_gradients
    seq_parallel_communication_data_type steps_per_print tensorboard timers wall_clock_breakdown wandb
    zero_optimization
    """
)
OURS = {
    "train_batch_size": "batch.windows",
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.windows and batch.micro_batch",
    "managed_gradient_accumulation": "batch.windows and batch.micro_batch",
    "optimizer": "optimizer",
    "scheduler": "stages.N.schedule",
    "gradient_clipping": "optimizer.clip",
    "bf16": "precision",
    "bfloat16": "precision",  # DeepSpeed's older name for bf16
    "fp16": "precision and loss_scale",
    "torch_autocast": "precision",
    "tensor_parallel": "mesh.tensor",
    "pipeline": "mesh.pipeline",
    "sequence_parallel_size": "mesh.sequence",
    "data_parallel_size": "mesh: data is what its other axes leave",
    "activation_checkpointing": "recompute",
    "compile": "compile",
    "checkpoint": "checkpoint",
    "datastates_ckpt": "checkpoint",
    "dataloader_drop_last": "loader",
    "vocabulary_size": "model.vocabulary",
    "zero_allow_untested_optimizer": "nothing: it is always on",
    "zero_force_ds_cpu_optimizer": "nothing: it is always off",
}
# Each with the value that does no harm, and what any other would break.
BREAKING: dict[str, tuple[Any, str]] = {
    "data_efficiency": (
        None,
        "it would choose other data, and the order of data is a function of settings and progress",
    ),
    "expert_parallel": (None, "it would exchange layers of the model, which would not be the one that is exported"),
    "use_data_before_expert_parallelism": (False, "there are no experts"),
    "hybrid_engine": (None, "it would exchange layers of the model, which would not be the one that is exported"),
    "weight_quantization": (None, "it would round the weights, which would not be those that are exported"),
    "autotuning": (None, "it would end the run after some steps; use cpt plan"),
    "gradient_allreduce_op": ("mean", "a step's gradient is the mean over its windows, on any number of ranks"),
}
TYPES_PASSED = _names("grad_accum_dtype buffer_dtype keep_in_fp32_modules")
TYPES_OURS = {"param_dtype": "precision"}
DROPPED = _names(
    """
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
    progressive_layer_drop quantize_training sparse_attention sparse_gradients
    """
)

ZERO_PASSED = _names(
    """
    contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
    allgather_bucket_size overlap_comm offload_param offload_optimizer sub_group_size prefetch_bucket_size
    param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance
    gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save use_all_reduce_for_fetch_params
    allgather_sequential ignore_unused_parameters parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear override_module_apply
    log_trace_cache_warnings enable_sanity_checks leaf_module
    """
)
ZERO_OURS = {
    "stage": "zero",
    "elastic_checkpoint": "checkpoint",
    "load_from_fp32_weights": "checkpoint",
    "pipeline_loading_checkpoint": "checkpoint",
    "save_muon_momentum_buffer_in_memory": "optimizer",
    "cpu_offload": "deepspeed.zero_optimization.offload_optimizer: {device: cpu}",
    "cpu_offload_param": "deepspeed.zero_optimization.offload_param: {device: cpu}",
    "cpu_offload_use_pin_memory": "pin_memory of deepspeed.zero_optimization.offload_optimizer and offload_param",
}
ZERO_BREAKING: dict[str, tuple[Any, str]] = {
    "round_robin_gradients": (False, "DeepSpeed would compute with other weights than its masters"),
    "module_granularity_threshold": (0, "DeepSpeed does not gather all weights in time with it; name a leaf_module"),
    "zenflow": (None, "it would update some of the weights later than others"),
    "compute_grad_norm": (True, "every step is told with its gradient norm"),
}
ZERO_DROPPED = _names(
    """
    legacy_stage1 mics_shard_size mics_hierarchical_params_gather zeropp_loco_param
    """
)
# DeepSpeed takes the settings of stage 3 with this before their names too.
_PREFIX = "stage3_"
_OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
# With them DeepSpeed cuts or sends within groups of neighbouring ranks, whatever the mesh.
_GROUPS_OF_NEIGHBOURS = ("zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_weights")


def contradictions(block: dict[str, Any], zero: int = 3) -> list[str]:
    """What in a `deepspeed:` block is ours to set, breaks a promise or is not known, with `zero` as the ZeRO stage.

    Both names are in one line where it is ours. `auto` means ours, as in Hugging Face's files.
    """
    faults = _unsorted(block, "deepspeed", PASSED, OURS, BREAKING, DROPPED)
    faults += [
        f"deepspeed.{key} = {block[key]!r}: DeepSpeed takes 'name: value' lines here"
        for key in ("zero_optimization", "data_types")
        if not isinstance(block.get(key, {}), dict) and block[key] != "auto"
    ]
    if isinstance(types := block.get("data_types"), dict):
        faults += _unsorted(types, "deepspeed.data_types", TYPES_PASSED, TYPES_OURS)
    of_zero = block.get("zero_optimization")
    if isinstance(of_zero, dict):
        where = "deepspeed.zero_optimization"
        plain = {_without_prefix(key): value for key, value in of_zero.items()}
        faults += _unsorted(plain, where, ZERO_PASSED, ZERO_OURS, ZERO_BREAKING, ZERO_DROPPED)
        for name, stages in _OFFLOADS.items():
            faults += _faults_of_offload(f"{where}.{name}", plain.get(name), stages, zero)
    return faults + _faults_of_scaling(block, zero)


def unfit(block: dict[str, Any], tensor: int) -> list[str]:
    """Settings of a `deepspeed:` block that mix up the ranks of groups of `tensor` ranks."""
    zero = block.get("zero_optimization", {})
    if tensor == 1 or not isinstance(zero, dict):
        return []
    return [
        f"deepspeed.zero_optimization.{name} with mesh.tensor = {tensor}: DeepSpeed would make groups of "
        "neighbouring ranks, which hold different parts of a layer; leave one of them out"
        for name in _GROUPS_OF_NEIGHBOURS
        if (value := zero.get(name)) is True or (isinstance(value, int) and value > 1)
    ]


def refuse_what_deepspeed_refuses(made: dict[str, Any]) -> None:
    """Raise Fault, with the names of what is wrong, if DeepSpeed cannot read the dictionary that it is to be given."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(dict(made))
    except ValidationError as error:
        raise Fault(
            f"deepspeed: {'.'.join(map(str, one['loc']))} = {one['input']!r}: DeepSpeed says: {one['msg']}"
            for one in error.errors()
        ) from error
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        raise Fault(f"deepspeed: DeepSpeed cannot read this block: {error}") from error


@contextlib.contextmanager
def told_as_faults(block: dict[str, Any]) -> Iterator[None]:
    """Around what DeepSpeed makes of a block: what it cannot do with these settings becomes a Fault.

    Without a block, or raised by our own code or by torch, it is an error of ours and stays what it is.
    """
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        if not block or not _raised_by_deepspeed(error):
            raise
        raise Fault(f"deepspeed = {block}: DeepSpeed cannot work with these settings: {error}") from error


def _raised_by_deepspeed(error: Exception) -> bool:
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").startswith(("deepspeed.", "pydantic."))


def _unsorted(
    block: dict[str, Any],
    where: str,
    passed: frozenset[str],
    ours: dict[str, str],
    breaking: dict[str, tuple[Any, str]] | None = None,
    dropped: frozenset[str] = frozenset(),
) -> list[str]:
    """A line for every setting of a block that is not passed through."""
    faults = []
    for key, value in block.items():
        name = f"{where}.{key}"
        if value == "auto" or key in passed:
            continue
        if key in ours:
            faults.append(_ours(name, ours[key]))
        elif breaking and key in breaking:
            harmless, why = breaking[key]
            is_off = isinstance(value, dict) and value.get("enabled", True) is False
            if value != harmless and not is_off:
                faults.append(f"{name}: {why}; take it out of the block")
        elif key in dropped:
            faults.append(f"{name}: DeepSpeed has dropped this setting; take it out of the block")
        else:
            faults.append(f"{name}: DeepSpeed has no such setting; {nearest(str(key), passed | ours.keys())}")
    return faults


def _ours(name: str, ours: str) -> str:
    return f"{name}: this is set by {ours} here; take it out of the block, or write auto"


def _without_prefix(key: str) -> str:
    bare = key.removeprefix(_PREFIX)
    return bare if key not in ZERO_PASSED and (bare in ZERO_PASSED or bare in ZERO_BREAKING) else key


def _faults_of_scaling(block: dict[str, Any], zero: int) -> list[str]:
    """Scaling of gradients around their sum, which DeepSpeed has not for sums of which a rank gets its own part."""
    of_zero = block.get("zero_optimization")
    is_scattered = not isinstance(of_zero, dict) or of_zero.get("reduce_scatter", "auto") in ("auto", True)
    return [
        f"deepspeed.{name} with zero = {zero}: DeepSpeed has it for whole sums only; "
        "take it out of the block, or set deepspeed.zero_optimization.reduce_scatter: false"
        for name, harmless in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0))
        if zero >= 2 and is_scattered and block.get(name, "auto") not in ("auto", harmless)
    ]


def _faults_of_offload(where: str, offload: Any, stages: tuple[int, ...], zero: int) -> list[str]:
    """Why what lies elsewhere in memory cannot be worked on, at this ZeRO stage."""
    if not isinstance(offload, dict) or offload.get("device", "none") in ("none", None):
        return []
    faults = []
    if zero not in stages:
        does = " or ".join(f"zero = {stage}" for stage in stages)
        faults.append(f"{where} with zero = {zero}: DeepSpeed has nothing to put elsewhere then; use {does}")
    if offload["device"] == "nvme":
        faults.append(
            f"{where}.device = nvme: methods and checkpoints read and write the masters in memory; use device: cpu"
        )
    if offload.get("ratio", 1.0) != 1.0 or offload.get("super_offload", False):
        name = "super_offload" if offload.get("super_offload", False) else "ratio"
        faults.append(f"{where}.{name}: it needs DeepSpeed's own CPU optimiser, AdamW here is torch's; leave it out")
    return faults
