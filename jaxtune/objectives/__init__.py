"""Objectives: `module -> loss_fn`, where `loss_fn(params, batch, key) -> ((sum f32[], weight f32[]), aux)`."""
