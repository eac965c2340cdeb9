"""Torch's tests of its non-reentrant checkpoint, restated for reversible chains.

Each runs a rewired network against stored execution of the same one. This file: inputs, outputs
and gradients. ``counts``, ``surroundings``, ``nested`` and ``hooks`` below stand for the files
test_checkpoint_counts.py and so on; ``test_`` and ``test_checkpoint(ing)_without_reentrant`` are
left out of torch's names.

test_autograd.py, TestAutograd
    (none), input_requires_grad             test_inputs_with_and_without_a_gradient
    correct_grad                            test_backward_and_grad_agree
    arbitrary_input_output                  test_structures_and_what_is_no_tensor
    with_block_mask                         test_runtime_faults.py: test_side_inputs_in_containers
    detached_tensor                         test_detached_branches
    saved_object_identity                   test_a_saved_tensor_is_the_one_that_was_saved
    parameter_used_in_an_out                test_hooks_of_a_parameter_inside_and_outside
    memory_savings                          counts: test_bytes_kept_for_the_backward
    dataparallel                            hooks: test_data_parallel, test_backwards_in_other_...
    custom_function_works                   nested: test_a_function_that_reads_twice
    custom_autograd_ac_early_stop           nested: test_what_a_function_saved_is_freed
    with_context_fn                         hooks: test_a_mode_around_forward_and_backward
    checkpointing_non_reentrant_autocast_*  surroundings: test_autocast, ..._within_autocast
    checkpoint_graph_execution_group        counts: test_two_backwards_over_parts_of_a_graph;
                                            a group is torch's own: each backward has its walk
    checkpoint_detects_non_determinism      surroundings: test_a_branch_that_is_not_deterministic
    access_saved_tensor_twice_...           counts: test_a_saved_tensor_is_looked_at_outside_...
    checkpoint_valid_reset_on_error         hooks: test_an_error_in_a_branch
    checkpoint_device_context_fn            surroundings: test_a_device_context_around_...
    checkpoint_automatic_dynamic_* (3)      hooks: test_a_compiled_function_in_a_branch
    checkpoint_compile_no_recompile         does not apply: situations/test_rows_compile.py
    checkpoint_error_suggests_mark_dynamic  does not apply: the text of another error
    *_warns_if_use_reentrant_not_passed...  does not apply: no such argument
    checkpointing (of 2000 inputs)          does not apply: reentrant, and the first one above

test_autograd.py, TestNestedCheckpoint; early_stop=False does not apply: it cannot be turned off
    nested_checkpoint                       nested: test_checkpoints_and_derivatives_around_a_chain,
                                            test_the_graph_goes_..., test_a_gradient_inside_of_...
    two_children                            nested: test_checkpoints_and_..._around_two_chains
    non_tensor_inputs_and_outputs, kwargs   test_structures_and_..., test_inputs_with_and_...
    same_graph                              nested: test_hooks_on_the_graph_run_once
    reentrant_backwards                     nested: test_a_backward_in_a_hook_of_a_backward
    set_early_stop                          counts: test_the_first_branch_stops_when_all_is_there
    set_early_stop_no_recompution_needed    counts: test_nothing_runs_again_that_nothing_asks_for

test_autograd.py, TestSelectiveActivationCheckpoint
    flops_and_mem                           counts: test_arithmetic_of_a_backward
    output_already_has_autograd_meta,
    function_with_more_than_one_output      surroundings: test_writes_and_views_in_a_branch
    function_with_non_tensor_output,
    policy_with_state                       surroundings: test_selective_checkpoints
    version_counter                         surroundings: test_a_write_to_a_saved_tensor
    storage_lifetime                        counts: test_what_was_brought_back_is_freed_at_once
    can_only_trigger_recompute_once         counts: test_branches_run_again_once; here it can twice
    bad_inputs, subclass_dispatching_sizes,
    auto_naming_mode_names                  does not apply: re2fx has no policy of operators

test_utils.py, TestCheckpoint
    checkpoint_trigger                      counts: test_branches_run_again_once
    checkpoint_valid                        nested: test_checkpoints_and_derivatives_around_a_chain
    checkpoint, checkpoint_module_list      nested: test_a_sequence_of_chains
    checkpoint_rng_cpu                      surroundings: test_random_numbers
    not_preserve_rng_state_and_without_...  nested: test_a_checkpoint_around_a_chain
    non_tensor, non_tensor_inputs_outputs   test_structures_and_what_is_no_tensor
    no_tensors                              test_no_tensor_among_the_inputs
    partial_grad                            test_one_of_two_inputs_..., test_nothing_needs_a_...
    early_free                              counts: test_what_was_brought_back_is_freed_at_once,
                                            test_nothing_stays_of_a_backward_that_ends_early
    checkpoint_rng_gpu, get_device_states_*,
    infer_device_state_*                    does not apply: needs a GPU, or is of a private function
    sequential_deprecated_* (2)             does not apply: no such function

distributed/test_c10d_common.py, all in situations/test_rows_distributed.py, REPLICATED
    ddp_checkpointing_once                  once, static graph
    ..._unused_params                       unused; static graph, unused
    ..._twice, ..._twice_static_graph       twice; static graph, twice
    ..._dynamic_module                      dynamic, grows; dynamic, shrinks
    ..._dynamic_weight_sharing              dynamic, shared
    ..._weight_sharing,
    ..._twice_weight_sharing                shared; static graph, shared (the block runs four times)

distributed/_composable/test_checkpoint.py, distributed/fsdp/test_checkpoint_wrapper.py
    tensor_only_*, random_cpu, multi_args   the first ones above
    clears_state_on_error_in_forward        hooks: test_an_error_in_a_branch
    forward_missing_attributes, fqn,
    checkpoint_wrapper_parity               nested: test_a_checkpoint_wrapper_around_a_chain
    args_kwargs, kwarg_support              test_inputs_with_and_without_a_gradient
    apply_activation_checkpointing          nested: test_a_checkpoint_around_each_block
    cpu_offload                             hooks: test_saved_tensor_hooks

Beyond torch's: test_only_the_blocks_behind_a_wanted_gradient, test_autocast_within_autocast,
test_another_default_dtype_in_the_backward, test_the_order_of_hooks, and in ``nested`` chains and
checkpoints inside of branches and backwards that run a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .chains import Branch, Chain, Parts, X, calls, chain, of
from .compare import weighted
from .situations.harness import Run, compare, double, example, pair

# Inputs, outputs, gradients


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_inputs_with_and_without_a_gradient(wanted: bool, named: bool) -> None:
    """By position and by name."""

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        x = inputs[0] if wanted else inputs[0].detach()
        output = run(x=x) if named else run(x)
        weighted(output).backward()
        return output

    both = of(torch.tanh)
    left = compare(both, X, situation=situation)
    assert (left.gradients["input 0"] is None) == (not wanted)
    assert left.gradients["branches.0.inner.weight"] is not None


def test_backward_and_grad_agree() -> None:
    """What `torch.autograd.grad` returns is what `backward` adds up."""
    both = of(torch.tanh)
    parameters = list(both.model.parameters())
    weighted(both.reversible(X)).backward()
    grads = torch.autograd.grad(weighted(both.reversible(X)), parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


class Structured(Parts):
    """Takes and returns more than tensors."""

    def forward(self, given: Any, scale: int = 1, extra: Any = None) -> Any:
        x = self.stem(given["x"]) * scale
        for branch in self.branches:
            x = x + branch(x) * given["masks"][0]
        return {"results": [x, (x.square(),)], "scale": scale, "extra": extra, "sure": True}, given


def test_structures_and_what_is_no_tensor() -> None:
    """Dicts, tuples, numbers, None and a bool, into the model and out of it."""
    mask = example(4)

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        given = {"x": inputs[0], "masks": (mask,)}
        result, same = run(given, 3)
        assert result["scale"] == 3
        assert result["extra"] is None
        assert result["sure"] is True
        assert same["x"] is inputs[0]
        assert same["masks"][0] is mask
        first, (second,) = result["results"]
        (weighted(first) + weighted(second)).backward()
        return first, second

    model = double(Structured(*[Branch() for _ in range(3)]))
    both = pair("eager", model, {"x": X, "masks": (mask,)}, 3, leaves=[Branch])
    compare(both, X, situation=situation)


class Numbers(Parts):
    """Takes no tensor."""

    def forward(self, scale: float) -> Tensor:
        x = self.stem.weight * scale
        for branch in self.branches:
            x = x + branch(x)
        return x


def test_no_tensor_among_the_inputs() -> None:
    """The parameters have gradients all the same."""
    both = pair("eager", double(Numbers(Branch(), Branch())), leaves=[Branch])
    compare(both, 0.7)


class Two(Parts):
    """Hands its second input on."""

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        for branch in self.branches:
            x = x + branch(x) * other
        return x, other


@pytest.mark.parametrize("trained", [0, 1])
def test_one_of_two_inputs_has_a_gradient(trained: int) -> None:
    """An output that needs none does not get one."""

    def situation(run: Run, model: nn.Module, inputs: Any) -> Any:
        inputs[1 - trained].requires_grad_(False)
        outputs = run(*inputs)
        assert outputs[1].requires_grad == (trained == 1)
        weighted(outputs[0]).backward()
        return outputs

    both = pair("eager", double(Two(Branch(), Branch())), leaves=[Branch])
    left = compare(both, X, X + 1, situation=situation)
    assert left.gradients[f"input {1 - trained}"] is None


def silent(x: Tensor) -> Tensor:
    """Without a gradient."""
    with torch.no_grad():
        return torch.tanh(x)


def partly(x: Tensor) -> Tensor:
    """Gradients off, on again inside, and off by the switch."""
    with torch.no_grad():
        y = x.exp()
        with torch.enable_grad():
            z = x.sin()
    with torch.set_grad_enabled(False):
        return z.detach() + y + (x.cos() if x.requires_grad else x)


def mixed(x: Tensor) -> Tensor:
    """One factor detached, one not."""
    with torch.no_grad():
        scale = x.sigmoid()
    return x.detach().cos() * x.sin() * scale


@pytest.mark.parametrize("function", [silent, partly, mixed])
def test_detached_branches(function: Callable[[Tensor], Tensor]) -> None:
    """Grad mode changes inside of a branch; three steps, one like the other."""
    both = of(function)
    for _ in range(3):
        compare(both, X)
    assert torch.is_grad_enabled()


def test_nothing_needs_a_gradient() -> None:
    """Frozen from end to end: the output has no history, and no branch is run again."""
    both = of(torch.tanh)
    both.model.requires_grad_(False)
    for run in both:
        assert not run(X).requires_grad
    assert calls(both) == [2, 2, 2]


def test_hooks_of_a_parameter_inside_and_outside() -> None:
    """Tied into the stem, the branches and the end: one gradient, so the hook runs once."""
    branches = [Branch() for _ in range(3)]
    model = Ends(*branches)
    for branch in branches:
        branch.inner.weight = model.stem.weight
    both = pair("eager", double(model), leaves=[Branch])
    seen: list[Tensor] = []
    model.stem.weight.register_hook(seen.append)
    compare(both, X)
    assert len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-11, atol=1e-12)


class Ends(Chain):
    """Ends with the weight it began with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.stem.weight


class Keep(torch.autograd.Function):
    """Scales by a saved tensor, and shows what the backward finds of it."""

    found: list[Tensor] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        Keep.found.append(kept)
        return grad * kept, None


class Scaled(nn.Module):
    """A branch that saves a parameter, or a tensor it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        out: Tensor = Keep.apply(x, self.scale if given is None else given)
        return out


class Given(Parts):
    """Hands a tensor to its branches."""

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x, given)
        return x


def test_a_saved_tensor_is_the_one_that_was_saved() -> None:
    """A parameter is itself, and what a branch was given has its memory: nothing is copied."""
    both = chain(Scaled(), Scaled())
    Keep.found.clear()
    compare(both, X)
    scales = [branch.scale for branch in both.model.branches]  # type: ignore[union-attr]
    assert all(a is b for a, b in zip(Keep.found, scales[::-1] * 2, strict=True))

    other = pair("eager", double(Given(Scaled(), Scaled())), leaves=[Scaled])
    given = example(4)
    Keep.found.clear()
    other.reversible(X, given).sum().backward()
    assert [found.data_ptr() for found in Keep.found] == [given.data_ptr()] * 2
    Keep.found.clear()
