"""How far a model's predictions are from a teacher's, of a vocabulary whose rows a tensor group shares.

    KL(teacher || student) = sum over v of p_t (z_t - z_s) - logsumexp(z_t) + logsumexp(z_s)

Each rank sums over its own rows; three numbers a token are sent. Logits exist for some tokens at a time, and the
backward pass makes them again.

T tokens, D width, R rows of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cpt.parallel.mesh import Group

ALONE = Group()
_LOGITS_AT_ONCE = 2**22


def divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
    group: Group = ALONE,
    tokens_at_once: int | None = None,
) -> Tensor:
    """KL(softmax(teacher's logits / temperature) || softmax(logits / temperature)) of each token, in nats.

    hidden and teacher_hidden [..., D], weight and teacher_weight [R, D], the rows of this rank -> [...], fp32 at least,
    the same on all ranks of the group. Gradients go to `hidden` and `weight`; that of `hidden` is this rank's part of
    it: hand in what is `copied`.
    """
    tokens_at_once = tokens_at_once or max(1, _LOGITS_AT_ONCE // max(1, weight.shape[0]))
    flat = (hidden.flatten(0, -2), weight, teacher_hidden.flatten(0, -2), teacher_weight)
    return _Divergence.apply(*flat, temperature, group, tokens_at_once).view(hidden.shape[:-1])


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        temperature: float,
        group: Group,
        tokens_at_once: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Of this rank's rows: logsumexp of student and teacher, and the teacher's mean of z_t - z_s.
        here = torch.full((3, len(hidden)), -torch.inf, dtype=wide, device=hidden.device)
        here[2] = 0.0
        for start in range(0, len(hidden) if len(weight) else 0, tokens_at_once):
            part = slice(start, start + tokens_at_once)
            logits = functional.linear(hidden[part], weight).to(wide) / temperature  # [tokens_at_once, R]
            of_teacher = functional.linear(teacher_hidden[part], teacher_weight).to(wide) / temperature
            here[0, part], here[1, part] = logits.logsumexp(dim=-1), of_teacher.logsumexp(dim=-1)
            shares = (of_teacher - here[1, part, None]).exp()
            here[2, part] = (shares * (of_teacher - logits)).sum(dim=-1)
        student, teacher, mean = here
        if group.size > 1:
            of_ranks = [torch.empty_like(here) for _ in range(group.size)]
            dist.all_gather(of_ranks, here, group=group.handle)
            students, teachers, means = torch.stack(of_ranks, dim=1)  # each [size, T]
            student, teacher = students.logsumexp(dim=0), teachers.logsumexp(dim=0)
            mean = ((teachers - teacher).exp() * means).sum(dim=0)
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, student, teacher)
        ctx.temperature, ctx.tokens_at_once = temperature, tokens_at_once
        return mean - teacher + student

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, student, teacher = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=gradient.dtype, device=weight.device)
        for start in range(0, len(hidden) if len(weight) else 0, ctx.tokens_at_once):
            part = slice(start, start + ctx.tokens_at_once)
            logits = functional.linear(hidden[part], weight).to(gradient.dtype) / ctx.temperature
            of_teacher = functional.linear(teacher_hidden[part], teacher_weight).to(gradient.dtype) / ctx.temperature
            of_logits = (logits - student[part, None]).exp() - (of_teacher - teacher[part, None]).exp()
            of_logits = (of_logits * (gradient[part, None] / ctx.temperature)).to(hidden.dtype)
            grad_hidden[part] = of_logits @ weight
            grad_weight += of_logits.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None
