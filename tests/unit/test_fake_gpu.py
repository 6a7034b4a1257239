"""A GPU that is not there: what it says is right where it can be checked by hand, and it leaves nothing behind."""

import pytest
import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from cineray.pipeline.footprint.exchange_log import disagreement
from cineray.pipeline.footprint.fake_gpu import GPU, fake_gpu, join_fake_world

pytestmark = pytest.mark.slow

MB = 2**20


def test_it_counts_what_is_alive_and_the_peak():
    with fake_gpu() as gpu:
        first = torch.empty(MB, dtype=torch.uint8, device=GPU)
        second = torch.empty(2 * MB, dtype=torch.uint8, device=GPU)
        view = first[10:]  # no memory of its own
        torch.empty(8 * MB, dtype=torch.uint8)  # of the host
        assert gpu.ledger.live_bytes == 3 * MB
        del second
        assert gpu.ledger.live_bytes == MB
        assert gpu.ledger.peak_bytes == 3 * MB
        del first
        assert gpu.ledger.live_bytes == MB  # the view holds it
        del view
        assert gpu.ledger.live_bytes == 0


def test_it_counts_operations_and_waits():
    with fake_gpu() as gpu:
        product = torch.empty(8, 16, device=GPU) @ torch.empty(16, 32, device=GPU)
        assert gpu.ledger.flop == 2 * 8 * 16 * 32
        assert gpu.ledger.num_host_reads == 0
        assert bool(product.isfinite().all())  # what is not known is 1
        product.sum().item()
        torch.zeros(3, device=GPU).tolist()
        torch.zeros(3).tolist()  # on the host: no wait
        assert gpu.ledger.num_host_reads == 3


def test_small_tensors_have_values():
    with fake_gpu():
        numbers = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=GPU)
        numbers[0] = 5
        numbers *= 2
        assert numbers.tolist() == [10, 4, 6]
        assert (numbers.to(torch.int64).sum() + 1).item() == 21
        assert torch.arange(6, device=GPU).view(2, 3).T.tolist() == [[0, 3], [1, 4], [2, 5]]
        mixed = torch.cat([numbers, torch.empty(10**6, device=GPU, dtype=torch.float64).sum().view(1)])
        assert mixed.tolist() == [10, 4, 6, 1]  # the last is not known


def test_what_is_not_known_equals_1_alone():
    """So a picture of which nothing is known is not taken for zeros, which HunyuanVideo 1.5 takes for none."""
    with fake_gpu():
        seen, none = torch.empty(1, 729, 1152, device=GPU), torch.empty(1, 0, 1152, device=GPU)
        assert not torch.all(seen == 0)
        assert torch.all(seen == 1)
        assert torch.all(none == 0)


def test_the_mask_of_frames_is_as_large_as_diffusers_own_which_is_back_afterwards():
    block, host = HunyuanVideo15AttnBlock(8), torch.device("cpu")
    own = block.prepare_causal_attention_mask(3, 4, torch.float16, host, batch_size=2)
    with fake_gpu() as gpu:
        made = block.prepare_causal_attention_mask(3, 4, torch.float16, GPU, batch_size=2)
        assert (made.shape, made.dtype, made.stride()) == (own.shape, own.dtype, own.stride())
        assert gpu.ledger.live_bytes == 512  # 288, in the allocator's blocks: nothing is expanded
        del made
    again = block.prepare_causal_attention_mask(3, 4, torch.float16, host, batch_size=2)
    assert torch.equal(again, own)


def test_a_mask_names_as_many_places_as_it_has_and_the_host_waits_to_know():
    with fake_gpu() as gpu:
        rows, mask = torch.empty(3, 10**6, device=GPU), torch.tensor([True, False, True], device=GPU)
        assert rows[mask].shape == (2, 10**6)
        assert torch.arange(3, device=GPU)[mask].tolist() == [0, 2]
        assert gpu.ledger.num_host_reads == 3  # two masks, and the list


def test_an_exchange_is_as_if_all_ranks_had_sent_the_same():
    with fake_gpu() as gpu:
        join_fake_world(4, rank=1)
        group = dist.new_group([0, 1, 2, 3], backend="nccl")
        sums = torch.tensor([1.0, 2.0], device=GPU)
        dist.all_reduce(sums, group=group)
        assert sums.tolist() == [4, 8]
        gathered = list(sums.new_empty(4, 2))
        dist.all_gather(gathered, sums, group=group)
        assert [part.tolist() for part in gathered] == [[4, 8]] * 4
        received, sent = torch.empty(5, 3, device=GPU), torch.empty(8, 3, device=GPU)
        dist.all_to_all_single(received, sent, output_split_sizes=[2, 1, 1, 1], input_split_sizes=[2] * 4, group=group)
        names = [(e.name, e.ranks, e.num_bytes, e.sent_bytes) for e in gpu.ledger.exchanges]
        ranks = (0, 1, 2, 3)
        assert names == [
            ("allreduce_", ranks, 8, 12.0),
            ("allgather_", ranks, 8, 24),
            ("alltoall_base_", ranks, 96, 72),
        ]
        assert gpu.ledger.exchanges[-1].received == (24, 12, 12, 12)


def test_attention_takes_the_kernel_that_a_gpu_would():
    with fake_gpu() as gpu:
        query = torch.empty(1, 8, 4096, 64, dtype=torch.bfloat16, device=GPU)
        gpu.ledger.begin()
        functional.scaled_dot_product_attention(query, query, query)
        assert (gpu.ledger.num_masked, gpu.ledger.num_unmasked) == (0, 1)
        assert gpu.ledger.peak_bytes - query.nbytes < 2 * query.nbytes  # no scores
        mask = torch.ones(1, 1, 1, 4096, dtype=torch.bool, device=GPU)
        functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        assert (gpu.ledger.num_masked, gpu.ledger.num_unmasked) == (1, 1)


def test_a_tensor_on_another_device_is_found():
    with fake_gpu(), pytest.raises(RuntimeError, match=r"cuda.*cpu|cpu.*cuda"):
        torch.empty(4, 4, device=GPU) @ torch.empty(4, 4)


def test_a_tensor_of_another_type_is_found():
    with fake_gpu(), pytest.raises(RuntimeError, match="dtype"):
        torch.empty(4, 4, device=GPU) @ torch.empty(4, 4, device=GPU, dtype=torch.bfloat16)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_behind(fails):
    def state():
        return (
            torch.cuda.set_device,
            torch.cuda.current_device,
            torch.cuda.get_device_capability,
            functional.scaled_dot_product_attention,
            dist.new_group,
            dist.is_initialized(),
            torch.is_grad_enabled(),
            dict(vars(FakeTensor)),
        )

    before = state()
    try:
        with fake_gpu():
            join_fake_world(2, rank=0)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert state() == before
    assert isinstance(torch.zeros(2), torch.Tensor)
    assert not isinstance(torch.zeros(2), FakeTensor)
    if not torch.cuda.is_available():
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), pytest.raises(RuntimeError):  # the device guard is gone again
            torch.empty(2, device="cuda:0")[0]


def test_where_ranks_disagree_is_said():
    def log(rank, *calls):
        with fake_gpu() as gpu:
            join_fake_world(2, rank)
            group = dist.new_group([0, 1])
            for call in calls:
                call(group)
            return gpu.ledger.exchanges

    def reduce(group):
        dist.all_reduce(torch.zeros(2, device=GPU), group=group)

    def gather(group):
        dist.all_gather(list(torch.zeros(2, 2, device=GPU)), torch.zeros(2, device=GPU), group=group)

    def swap(sent, received):
        def call(group):
            dist.all_to_all_single(
                torch.empty(sum(received), device=GPU), torch.empty(sum(sent), device=GPU), received, sent, group=group
            )

        return call

    def send_to(peer):
        return lambda group: dist.send(torch.zeros(2, device=GPU), peer, group=group)

    assert disagreement([log(0, reduce, gather), log(1, reduce, gather)]) is None
    assert disagreement([log(0, reduce, gather), log(1, reduce)]) is not None
    assert disagreement([log(0, reduce, gather), log(1, gather, reduce)]) is not None
    assert disagreement([log(0, swap([1, 2], [1, 3])), log(1, swap([3, 4], [2, 4]))]) is None
    assert "expects" in str(disagreement([log(0, swap([1, 2], [1, 3])), log(1, swap([2, 4], [2, 4]))]))
    assert "receives 0 times" in str(disagreement([log(0, send_to(1)), log(1)]))
