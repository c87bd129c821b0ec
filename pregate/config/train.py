"""The settings of a training: steps, batches, optimizer, losses, teacher, what learns, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from pregate.config.choices import (
    DistillData,
    ExpertPath,
    Experts,
    Keep,
    Optimizer,
    Precision,
    RoutingLoss,
    Schedule,
    Sharding,
    Trainable,
)
from pregate.config.lora import LoraConfig
from pregate.config.validators import TEMPERATURE, WEIGHT, Limit, above, at_least, need, setting

DROPOUT = Limit(lambda rate: 0 <= rate < 1, "must lie in [0, 1), or be null to keep the model's own")


@dataclass
class TrainConfig:
    """One fine-tuning (or from-scratch) run. Batch sizes count sequences over all devices per optimizer step.

    `steps: 0` of `train` leaves the converted model as it is. `teacher`: a model of the same family (directory or hub
    id) to learn from beside the data; `distill_logits` and `distill_routing` weight what is learned from it, see
    `pregate.training.distill`, and `distill_temperature` softens the output logits. `distill_data: generations` puts
    the teacher's answers in place of the targets. `packing`: several examples stand in one row and do not see each
    other. `keep_last`: how many states to resume from are kept, the newest included.
    `sharding: full` splits weights, gradients and optimizer state over the processes (FSDP2). `experts: offloaded`:
    those of the model and of its teacher stay frozen where `engine` says. `lora`: what learns beside the gates with
    `trainable: lora`.
    """

    steps: int = setting(2048, at_least(0))
    batch_sequences: int = setting(256, at_least(1))
    micro_batch_tokens: int = setting(4096, at_least(1))
    packing: bool = False
    optimizer: Optimizer = Optimizer.adamw
    learning_rate: float = setting(1e-4, above(0))
    weight_decay: float = 0.0
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    clip_norm: float | None = setting(1.0, above(0, ", or null for no clipping"))
    precision: Precision = Precision.auto
    balance_loss: float = 1e-2
    z_loss: float = 1e-3
    dropout: float | None = setting(None, DROPOUT)
    teacher: str | None = None
    distill_logits: float = setting(0.0, WEIGHT)
    distill_routing: float = setting(0.0, WEIGHT)
    distill_routing_loss: RoutingLoss = RoutingLoss.kl
    distill_temperature: float = setting(1.0, TEMPERATURE)
    distill_data: DistillData = DistillData.task
    trainable: Trainable = Trainable.all
    experts: Experts = Experts.resident
    lora: LoraConfig = field(default_factory=LoraConfig)
    keep: Keep = Keep.best
    expert_path: ExpertPath = ExpertPath.grouped
    gradient_checkpointing: bool = False
    sharding: Sharding = Sharding.none
    eval_every: int = setting(256, at_least(1))
    eval_examples: int = setting(256, at_least(1))
    save_every: int = setting(256, at_least(1))
    keep_last: int = setting(2, at_least(1))
    log_every: int = setting(10, at_least(1))

    def check(self, prefix: str) -> None:
        need(
            self.warmup_steps >= 0 and (self.warmup_steps <= self.steps or self.steps == 0),
            f"{prefix}warmup_steps={self.warmup_steps} must lie between 0 and {prefix}steps={self.steps}.",
        )
        need(
            self.trainable is Trainable.lora or self.lora == LoraConfig(),
            f"{prefix}lora is for {prefix}trainable=lora: set both, or leave it out.",
        )
        weighted = self.distill_logits > 0 or self.distill_routing > 0
        need(
            not weighted or self.teacher is not None,
            f"{prefix}distill_logits and {prefix}distill_routing need a teacher: set {prefix}teacher=DIR_OR_ID, or "
            "both to 0.",
        )
        need(
            weighted or self.distill_data is DistillData.generations or self.teacher is None,
            f"{prefix}teacher={self.teacher} teaches nothing: set {prefix}distill_logits or {prefix}distill_routing "
            f"above 0, or {prefix}distill_data=generations, or {prefix}teacher=null.",
        )
        need(
            self.distill_routing > 0 or self.distill_routing_loss is RoutingLoss.kl,
            f"{prefix}distill_routing_loss={self.distill_routing_loss} has no weight: set {prefix}distill_routing "
            "above 0, or leave it out.",
        )
        whole = self.sharding == Sharding.none
        need(
            whole or self.optimizer in (Optimizer.adamw, Optimizer.adamw_scaled),
            f"{prefix}optimizer={self.optimizer} needs whole matrices, and {prefix}sharding={self.sharding} splits "
            f"them: set {prefix}optimizer=adamw or adamw_scaled, or {prefix}sharding=none.",
        )
        need(
            whole or self.trainable is not Trainable.lora,
            f"{prefix}trainable=lora needs whole matrices, and {prefix}sharding={self.sharding} splits them: set "
            f"{prefix}sharding=none.",
        )
        resident = self.experts is Experts.resident
        need(
            self.distill_data is DistillData.task or (self.teacher is not None and whole and resident),
            f"{prefix}distill_data={self.distill_data} needs a teacher that is whole in memory: set "
            f"{prefix}teacher=DIR_OR_ID, {prefix}sharding=none and {prefix}experts=resident.",
        )
        need(
            resident or self.trainable in (Trainable.all_but_experts, Trainable.gates),
            f"{prefix}experts=offloaded leaves the experts as they are and has no adapters: set "
            f"{prefix}trainable=all_but_experts or gates instead of {self.trainable}, or {prefix}experts=resident.",
        )
        need(
            resident or self.expert_path is ExpertPath.grouped,
            f"{prefix}expert_path={self.expert_path} needs the experts in memory: leave it out, or set "
            f"{prefix}experts=resident.",
        )
