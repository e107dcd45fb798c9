"""Loss and gradient of gathered positions against the plain way: all logits, then the sum over the supervised tokens."""

import pytest
import torch
from support import launch
from support.plain_loss import CASES, VOCABULARY, batch, build, gradients, plainly
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vig import output_head
from vig.output_head import is_untouched
from vig.training.trainer import SupervisedPass


def gathered(model, inputs, labels, weights=None):
    head = model.get_output_embeddings()
    supervised = SupervisedPass(labels, weights)
    with supervised.at(head, untouched=is_untouched(model, head, inputs)):
        outputs = model(**inputs)
    return supervised.result(outputs.logits)


def assert_same(model, inputs, labels, atol=1e-6, **options) -> None:
    wanted, got = plainly(model, inputs, labels, **options), gathered(model, inputs, labels, **options)
    assert got.dtype == torch.float32 and got.shape == ()
    torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-5)
    expected, actual = gradients(model, wanted), gradients(model, got)
    assert expected.keys() == actual.keys() and any(g.any() for g in actual.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("chunk", [1024, 4])
@pytest.mark.parametrize("name", CASES)
def test_any_model(name, chunk, monkeypatch) -> None:
    monkeypatch.setattr(output_head, "GRADIENT_CHUNK", chunk)
    model = build(name)
    inputs, labels = batch()
    assert is_untouched(model, model.get_output_embeddings(), inputs) == (name != "PaliGemma")
    assert model.training and "forward" not in vars(model.get_output_embeddings())
    assert_same(model, inputs, labels)


@pytest.mark.parametrize("name", ["Llava", "PaliGemma"])
def test_weights_and_padding_side(name, monkeypatch) -> None:
    monkeypatch.setattr(output_head, "GRADIENT_CHUNK", 4)
    inputs, labels = batch("left")
    assert_same(build(name), inputs, labels, weights=torch.rand(labels.shape))


class MostRows(TorchDispatchMode):
    """The most rows of logits, of the vocabulary's width, that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, x.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize(("name", "chunk", "rows"), [("Llava", 4, 4), ("Llava", 1024, None), ("PaliGemma", 4, None)])
def test_logits_of_all_positions_never_exist(name, chunk, rows, monkeypatch) -> None:
    """As many rows as a chunk, or as there are supervised tokens; a matrix of the head's own shape has 32 or 89 rows."""
    monkeypatch.setattr(output_head, "GRADIENT_CHUNK", chunk)
    model, (inputs, labels) = build(name), batch()
    inputs, labels = ({k: v.repeat(12, 1) for k, v in inputs.items()}, labels.repeat(12, 1).where(torch.arange(36)[:, None] < 3, -100))
    supervised = int((labels != -100).sum())
    assert 4 < supervised < 20 and labels.numel() == 432
    for function, expected in ((gathered, rows or supervised), (plainly, 432)):
        head = model.get_output_embeddings()
        seen = []
        handle = head.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape))
        with MostRows() as most:
            function(model, inputs, labels).backward()
        handle.remove()
        assert most.rows == max(expected, 32), most.rows  # the head's weight transposed is [32, V]
        if function is gathered:
            assert len(seen) == 2  # under its own hooks: once to try it and once for the batch


def test_nothing_supervised_is_zero_for_every_parameter() -> None:
    for name in ("Llava", "PaliGemma"):
        model, (inputs, labels) = build(name), batch()
        touched = gradients(model, plainly(model, inputs, labels)).keys()
        loss = gathered(model, inputs, torch.full_like(labels, -100))
        actual = gradients(model, loss)
        assert loss.item() == 0 and actual.keys() == touched
        assert not any(gradient.any() for gradient in actual.values())


def test_lora_also_on_the_head() -> None:
    peft = pytest.importorskip("peft")
    inputs, labels = batch()
    for options in ({"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        model = peft.get_peft_model(build("Llava"), peft.LoraConfig(r=2, init_lora_weights=False, **options))
        assert_same(model, inputs, labels)


def test_autocast_and_gradient_checkpointing(monkeypatch) -> None:
    monkeypatch.setattr(output_head, "GRADIENT_CHUNK", 4)
    model, (inputs, labels) = build("Llava"), batch()
    exact = gradients(model, plainly(model, inputs, labels))
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(model, inputs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        losses = plainly(model, inputs, labels), gathered(model, inputs, labels)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    actual = gradients(model, losses[1])
    for name, gradient in exact.items():
        if gradient.norm() > 1e-2:
            assert F.cosine_similarity(gradient.flatten(), actual[name].flatten(), dim=0) > 0.99, name


class Rounds(torch.nn.Module):
    """Rounds the model's outputs to bf16, as a mixed-precision policy may; the loss is to stay exact."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        outputs.logits = outputs.logits.bfloat16()
        return outputs


def test_outputs_rounded_by_a_policy() -> None:
    model, (inputs, labels) = build("Llava"), batch()
    wanted = plainly(model, inputs, labels)
    supervised = SupervisedPass(labels)
    with supervised.at(model.get_output_embeddings(), untouched=True):
        got = supervised.result(Rounds(model)(**inputs).logits)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    expected, actual = gradients(model, wanted), gradients(model, got)
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in expected)


def test_refused() -> None:
    model, (inputs, labels) = build("Llava"), batch()
    with pytest.raises(ValueError, match=r"\(3, 12\).*\(3, 11\)"):
        gathered(model, inputs, labels[:, :-1])
    with pytest.raises(ValueError, match="Llava"):
        is_untouched(model, torch.nn.Linear(2, 2), inputs)
    assert_same(model, inputs, labels)  # the head is what it was


def test_a_forward_of_the_instance_comes_back() -> None:
    model, (inputs, labels) = build("Llava"), batch()
    head = model.get_output_embeddings()
    own = head.forward
    head.forward = lambda x: own(x) * 2  # as accelerate's hooks do it
    ours = head.forward
    assert_same(model, inputs, labels)
    assert head.forward is ours


SHARDED = """
import sys, torch
import torch.distributed as dist
from support.plain_loss import batch, build, gradients, plainly
from vig import output_head
from vig.output_head import is_untouched
from vig.training.trainer import SupervisedPass
way = sys.argv[1]
output_head.GRADIENT_CHUNK = 4
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
plain, model = build("Llava"), build("Llava")
batches = [batch(seed=seed) for seed in range(4)]
batches[1] = (batches[1][0], torch.full_like(batches[1][1], -100))  # rank 1 has nothing supervised in its first
count = sum(int((labels != -100).sum()) for _, labels in batches)
wanted = sum(plainly(plain, inputs, labels) * (labels != -100).sum() for inputs, labels in batches if (labels != -100).any()) / count
expected = gradients(plain, wanted)
before = {name: p.detach().clone() for name, p in plain.named_parameters()}
head = model.get_output_embeddings()
if way == "fsdp2":  # in the units that accelerate makes
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.get_input_embeddings(), mesh=mesh)
    fully_shard([model.model.language_model.norm, head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    engine = model
else:
    import deepspeed
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
total = torch.zeros(())
for step, (inputs, labels) in enumerate(batches[rank::2]):
    if step == 0:
        assert is_untouched(engine, head, inputs)
    supervised = SupervisedPass(labels, None, count)
    with supervised.at(head, untouched=True):
        loss = supervised.result(engine(**inputs).logits)
    total += loss.detach()
    if way == "fsdp2":
        model.set_requires_gradient_sync(step == 1)
        (loss * 2).backward()  # ranks are averaged
    else:
        engine.backward(loss * 2, scale_wrt_gas=False)
        engine.step()
dist.all_reduce(total)
torch.testing.assert_close(total, wanted.detach(), atol=1e-6, rtol=1e-6)
for name, p in model.named_parameters():
    if way == "fsdp2":
        actual = torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor()
    else:
        with deepspeed.zero.GatheredParameters([p]):
            actual = before[name] - p.detach()  # one step at a learning rate of 1
    torch.testing.assert_close(actual, expected.get(name, torch.zeros_like(actual)), atol=1e-5, rtol=1e-4)
dist.barrier()
dist.destroy_process_group()
print("same")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_a_sharded_head_on_two_processes(way, monkeypatch) -> None:
    """Two ranks by two accumulated batches: the gradient is that of the whole sum on one process."""
    if way == "zero3":
        pytest.importorskip("deepspeed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert launch.run(SHARDED, way, count=2) == ["same\n"] * 2
