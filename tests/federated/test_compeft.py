"""Tests of ComPEFT: selection and scale, the code, hostile bytes, arithmetic, merging, files, PEFT models, tuning."""

import itertools
import json
import math
import os
import runpy
import shutil
import struct
import sys
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from workingpapers.federated.compeft import (
    ComPEFTTuner,
    TernaryUpdate,
    compress,
    compress_file,
    from_peft,
    inspect_file,
    into_peft,
    learn_weights,
    merge,
    original,
    pack_file,
    pruned,
    read_packed,
    sign_only,
    stc,
    uniform_quant,
    unpack_file,
)
from workingpapers.federated.compeft.__main__ import main
from workingpapers.federated.compeft.coding import (
    Segment,
    TernaryCode,
    TernaryEncoder,
    encode,
    entropy_bits,
    rice_shift,
)
from workingpapers.federated.compeft.packing import CHECKSUM, HEADER
from workingpapers.federated.compeft.sources import PIECE

CODINGS = ["golomb", "bitmask"]


def random_state(seed, scale=1.0, dtype=torch.float32, **shapes):
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"b": (7, 5), "a": (40, 3), "c": (11,)}
    return {key: (scale * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}


def flat(state_dict):
    return torch.cat([state_dict[key].double().flatten() for key in sorted(state_dict)]).numpy()


def ternary(update):
    return flat(update.residual()) / (update.scale or 1.0)


def expected_ternary(tau, density):
    """Steps 1 and 2 by sorting."""
    kept = np.argsort(-np.abs(tau), kind="stable")[: math.floor(density * len(tau))]
    signs = np.zeros(len(tau))
    signs[kept] = np.sign(tau[kept])
    return signs


# --------------------------------------------------------------------------------------------------------------------
# Selection and scale


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -2.0, 1e-42, -3e38]) | st.floats(-9, 9, width=32), min_size=2),
    st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 50),
)
@settings(max_examples=100, deadline=None)
def test_exactly_the_largest_entries_are_kept_and_ties_go_to_the_lower_index(values, density, dtype, split):
    tau = torch.tensor(values, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        update = compress({"a": tau[:split], "b": tau[split:]}, density=density, alpha="stc")
    np.testing.assert_array_equal(ternary(update), expected_ternary(tau.double().numpy(), density))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_selection_across_many_pieces_equals_sorting(dtype):
    # rounding makes thousands of ties, so that the tie rule decides in every piece
    state = {"a": (torch.randn(3 * PIECE + 17, generator=torch.Generator().manual_seed(0)) * 20).round() / 20}
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    for density in (0.01, 0.2, 0.7):
        update = compress(state, density=density)
        np.testing.assert_array_equal(ternary(update), expected_ternary(flat(state), density))
        assert update.nonzero == math.floor(density * update.size)


def test_scale_is_alpha_times_the_deviation_of_all_of_tau_about_its_mean():
    state = random_state(1)
    state["c"] += 1000.0  # a mean that E[x^2] - E[x]^2 in float32 would not survive
    for alpha in (0.5, 3.0):
        update = compress(state, density=0.1, alpha=alpha)
        assert update.scale == np.float32(alpha * flat(state).std(ddof=1))


def test_threshold_is_global_over_tensors_in_sorted_order():
    state = {"small": torch.full((10,), 0.1), "large": torch.arange(1.0, 11.0)}
    residual = compress(state, density=0.5).residual()
    assert (residual["large"] > 0).all()
    assert (residual["small"] == 0).all()
    equal = {"b": torch.tensor([1.0, -1.0, 1.0]), "a": torch.tensor([-1.0, 1.0, 1.0])}
    assert compress(equal, density=0.5).residual()["b"].count_nonzero() == 0  # ties are won by "a", which comes first


@pytest.mark.parametrize(("kind", "start"), [("lora", 0.0), ("ia3", 1.0)])
def test_adapters_are_rebuilt_from_where_they_do_nothing(kind, start):
    state = {key: tensor + start for key, tensor in random_state(2).items()}
    update = compress(state, density=0.3, alpha=2.0, kind=kind)
    rebuilt = update.to_state_dict()
    np.testing.assert_allclose(flat(rebuilt), start + update.scale * ternary(update), rtol=1e-6)
    np.testing.assert_array_equal(ternary(update), expected_ternary((flat(state) - start).astype(np.float32), 0.3))


def test_differences_from_a_base_are_taken_in_float32():
    base = random_state(3, dtype=torch.bfloat16)
    tuned = {key: (tensor.float() + 0.02 * torch.randn(tensor.shape)).bfloat16() for key, tensor in base.items()}
    tau = flat(tuned) - flat(base)
    update = compress(tuned, base, density=0.2, kind="full")
    np.testing.assert_array_equal(ternary(update), expected_ternary(tau, 0.2))
    assert update.scale == pytest.approx(tau.std(ddof=1), rel=1e-6)
    rebuilt = update.to_state_dict(base=base)
    for key, tensor in rebuilt.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, (base[key].float() + update.residual()[key]).bfloat16(), rtol=0, atol=0)
    assert update.to_state_dict(torch.float64, base=base)["a"].dtype == torch.float64


def test_lora_relative_to_its_initial_adapter():
    start, tuned = random_state(4), random_state(5)
    update = compress(tuned, start, density=1.0)
    assert update.relative
    assert update.kind == "lora"
    expected = flat(start) + update.scale * np.sign(flat(tuned) - flat(start))
    np.testing.assert_allclose(flat(update.to_state_dict(base=start)), expected, rtol=1e-6)


def test_tied_tensors_count_once_and_come_back_tied():
    embedding = torch.randn(6, 4)
    base_embedding = torch.zeros(6, 4)
    tuned = {"head": embedding, "body": torch.randn(3), "embed": embedding}
    base = {"head": base_embedding, "body": torch.zeros(3), "embed": base_embedding}
    update = compress(tuned, base, density=1.0, kind="full")
    assert update.size == 27
    rebuilt = update.to_state_dict(base=base)
    assert rebuilt["head"] is rebuilt["embed"]
    assert TernaryUpdate.unpack(update.pack()).to_state_dict(base=base).keys() == tuned.keys()
    # tied in the tuned model only: the two differences are not the same
    untied = compress(tuned, base | {"head": torch.ones(6, 4)}, density=1.0, kind="full")
    assert untied.size == 51


def test_zero_residual_gives_zero_and_few_nonzeros_are_all_kept():
    with pytest.warns(UserWarning, match="only 0 non-zeros"):
        nothing = compress({"a": torch.zeros(10)})
    assert nothing.scale == 0.0
    assert nothing.nonzero == 0
    assert (TernaryUpdate.unpack(nothing.pack()).to_state_dict()["a"] == 0).all()
    with pytest.warns(UserWarning, match=r"only 2 non-zeros.*asks for 5"):
        sparse = compress({"a": torch.tensor([0.0, 3.0, 0, 0, -1, 0, 0, 0, 0, 0])}, density=0.5)
    assert sparse.nonzero == 2
    assert sparse.density == 0.2
    with pytest.warns(UserWarning, match="keeps none"):
        assert compress({"a": torch.randn(4)}, density=0.2).nonzero == 0


def test_stc_minimises_the_error_and_the_published_gaussian_errors_come_out():
    state = {"a": torch.randn(200_000, generator=torch.Generator().manual_seed(0))}
    tau = flat(state)

    def error(update):
        return np.linalg.norm(tau - flat(update.residual())) / np.linalg.norm(tau)

    for density, stc_error, unit_error in [(0.05, 0.852, 0.903), (0.1, 0.758, 0.829), (0.2, 0.620, 0.706)]:
        best = stc(state, density=density)
        np.testing.assert_allclose(error(best), stc_error, atol=0.003)
        np.testing.assert_allclose(error(compress(state, density=density)), unit_error, atol=0.003)
        assert best.scale == pytest.approx(np.abs(tau)[ternary(best) != 0].mean(), rel=1e-6)
        for factor in (0.98, 1.02):
            assert error(compress(state, density=density, alpha=factor * best.scale / tau.std(ddof=1))) > error(best)


# --------------------------------------------------------------------------------------------------------------------
# The code


def reference_bits(vector, shift):
    """The gap code bit by bit, from its definition."""
    mark_zeros = 2 * np.count_nonzero(vector) > len(vector)
    bits, gap = [], 0
    for value in vector:
        if (value == 0) == mark_zeros:
            bits += [0] * (gap >> shift) + [1] + [gap >> place & 1 for place in range(shift)]
            gap = 0
        else:
            gap += 1
    return bits


vectors = st.builds(
    lambda size, density, seed: np.random.default_rng(seed).choice(
        np.array([-1, 0, 1], dtype=np.int8), size, p=[density / 2, 1 - density, density / 2]
    ),
    st.integers(0, 700),
    st.sampled_from([0.0, 0.003, 0.05, 0.3, 0.5, 0.8, 0.99, 1.0]),
    st.integers(0, 10**6),
)


@given(vectors, st.lists(st.integers(0, 200)), st.lists(st.integers(0, 200)))
@settings(max_examples=100, deadline=None)
def test_code_is_golomb_rice_in_every_segment_and_reads_back_in_any_pieces(vector, cuts, pieces):
    ends = np.minimum(np.cumsum([0, *cuts]), len(vector))
    ends = [*ends, len(vector)]
    stretches = [vector[first:last] for first, last in itertools.pairwise(ends)]
    encoder = TernaryEncoder((len(stretch), np.count_nonzero(stretch)) for stretch in stretches)
    encoder.write(vector)
    code = encoder.finish()
    gaps, signs = code.payload()
    bits = np.unpackbits(np.frombuffer(gaps, np.uint8), bitorder="little")[: code.bits]
    parts = zip(stretches, code.segments, strict=True)
    assert bits.tolist() == [bit for stretch, part in parts for bit in reference_bits(stretch, part.shift)]
    negative = np.unpackbits(np.frombuffer(signs, np.uint8), bitorder="little")[: code.nonzero]
    assert negative.tolist() == (vector[vector != 0] < 0).astype(int).tolist()

    again = TernaryCode.from_payload(code.segments, code.bits, gaps, signs)
    ends = np.minimum(np.cumsum([0, *pieces]), len(vector))
    lengths = [*np.diff(ends), len(vector) - ends[-1]]
    np.testing.assert_array_equal(np.concatenate([piece.copy() for piece in again.chunks(lengths)]), vector)


def test_gaps_longer_than_a_word_and_fields_across_words():
    vector = np.zeros(100_000, dtype=np.int8)
    vector[[3, 70_000, 70_001, 99_999]] = [1, -1, 1, -1]
    for shift in (0, 5, 40, 62):  # not the best, but a file may have them
        bits = reference_bits(vector, shift)
        gaps = np.packbits(bits, bitorder="little").tobytes()
        segment = Segment(100_000, 4, shift)
        code = TernaryCode.from_payload((segment,), len(bits), memoryview(gaps), memoryview(b"\x0a"))
        np.testing.assert_array_equal(next(code.chunks([100_000])), vector)


@pytest.mark.parametrize(("density", "shift"), [(0.05, 4), (0.1, 3), (0.2, 2), (0.5, 0)])
def test_length_is_the_formula_and_close_to_the_entropy(density, shift):
    size = 400_000
    vector = np.random.default_rng(0).choice(
        np.array([-1, 0, 1], np.int8), size, p=[density / 2, 1 - density, density / 2]
    )
    code = encode(vector)
    kept = code.nonzero / size
    assert code.segments[0].shift == rice_shift(code.nonzero, size) == shift
    formula = shift + 1 / (1 - (1 - kept) ** 2**shift)
    np.testing.assert_allclose(code.bits / code.nonzero, formula, rtol=0.003)
    assert 1 - 1e-4 < (code.bits + code.nonzero) / entropy_bits(size, code.nonzero) < 1.03


def test_tensors_of_unequal_density_pack_below_the_entropy_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    state = {"large": torch.randn(100_000, generator=generator), "small": torch.randn(100_000, generator=generator) / 5}
    update = compress(state, density=0.2)
    parts = [(part.size, part.nonzero) for part in update.code.segments]
    assert parts[0][1] > 50 * parts[1][1]
    assert update.nbytes() < 0.85 * update.nbytes("entropy")
    assert update.nbytes() < 1.04 * sum(entropy_bits(*part) for part in parts) / 8


def test_a_vector_that_is_not_what_was_announced_is_refused():
    for announced, vector in [((100, 3), np.ones(100)), ((100, 60), np.eye(1, 100)[0]), ((100, 97), np.zeros(100))]:
        encoder = TernaryEncoder([announced, (5, 5)])
        with pytest.raises(ValueError, match="has another number of non-zeros"):
            encoder.write(vector.astype(np.int8))


def test_above_one_half_the_zeros_are_coded():
    vector = np.ones(100_000, dtype=np.int8)
    vector[np.random.default_rng(0).random(100_000) < 0.1] = 0
    code = encode(vector)
    assert code.segments[0].marks_zeros
    assert (code.bits + code.nonzero) / entropy_bits(code.size, code.nonzero) < 1.01


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("density", [0.02, 0.4, 0.75, 1.0])
def test_pack_and_unpack_are_exact_and_sizes_are_real(coding, density):
    update = compress(random_state(6, dtype=torch.float16), density=density, alpha=1.7)
    blob = update.pack(coding)
    assert len(blob) == update.nbytes(coding)
    again = TernaryUpdate.unpack(blob)
    assert again.pack(coding) == blob
    assert again.pack() == update.pack()
    assert again.scale == update.scale
    assert again.description == update.description
    for key, tensor in update.to_state_dict().items():
        torch.testing.assert_close(again.to_state_dict()[key], tensor, rtol=0, atol=0)
    assert update.nbytes("entropy") * 8 == pytest.approx(entropy_bits(update.size, update.nonzero) + 16, abs=16)


# --------------------------------------------------------------------------------------------------------------------
# Hostile bytes


@pytest.fixture(scope="module")
def blobs():
    update = compress(random_state(7, a=(30, 10), b=(20,)), density=0.1)
    return {coding: update.pack(coding) for coding in CODINGS}


@pytest.mark.parametrize("coding", CODINGS)
def test_every_flipped_bit_and_every_truncation_is_found(blobs, coding):
    blob = blobs[coding]
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"packed"):
            TernaryUpdate.unpack(damaged)
    for length in range(len(blob)):
        with pytest.raises(ValueError, match=r"packed"):
            TernaryUpdate.unpack(blob[:length])
    with pytest.raises(ValueError, match=f"of {len(blob)} bytes is announced, got {len(blob) + 1}"):
        TernaryUpdate.unpack(blob + b"\0")


def signed(body):
    return bytes(body) + CHECKSUM.pack(zlib.crc32(body))


def forged(blob, description=None, **changes):
    """The blob with other header fields or another description, and a checksum that fits."""
    names = ["magic", "version", "coding", "size", "nonzero", "bits", "scale", "about"]
    fields = dict(zip(names, HEADER.unpack(blob[: HEADER.size]), strict=True))
    about, rest = fields["about"], blob[HEADER.size : -CHECKSUM.size]
    text = rest[:about] if description is None else description
    head = HEADER.pack(*(fields | {"about": len(text)} | changes).values())
    return signed(head + text + rest[about:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"PK\3\4..."}, "not a packed update"),
        ({"version": 2}, "packed as version 2, this program reads version 1"),
        ({"coding": 7}, "coding 7"),
        ({"size": 2**61}, "32 of them non-zero; its tensors 320 and 32"),
        ({"nonzero": 31}, "31 of them non-zero; its tensors 320 and 32"),
        ({"bits": 2**63}, "is announced"),
        ({"about": 2**32 - 1}, "is announced"),
        ({"scale": 0.0}, "scale of 32 non-zeros must be positive"),
        ({"scale": math.nan}, "scale of 32 non-zeros must be positive"),
        ({"scale": -1.0}, "scale of 32 non-zeros must be positive"),
    ],
)
def test_lying_headers_are_refused(blobs, changes, message):
    with pytest.raises(ValueError, match=message):
        TernaryUpdate.unpack(forged(blobs["golomb"], **changes))


def rows(sizes=(300, 20), nonzero=(28, 4), shifts=(3, 2)):
    return [[name, "F32", [size], *code] for name, size, *code in zip("ab", sizes, nonzero, shifts, strict=True)]


def described(**changes):
    fields = {"kind": "lora", "relative": False, "tensors": rows(), "tied": {}, "config": ""}
    return zlib.compress(json.dumps(fields | changes).encode())


@pytest.mark.parametrize(
    "description",
    [
        b"no zlib",
        zlib.compress(b"no json"),
        zlib.compress(b"[" * 100_000),
        zlib.compress(b" " * 2**26 + zlib.decompress(described())),
        zlib.compress(b"{}"),
        described()[:-3],
        described() + b"!",
        described(kind="other"),
        described(kind="full"),
        described(relative=1),
        described(tensors=[["a", "F32", [-1, -320], 32, 3]]),
        described(tensors=[["a", "F32", [2**70], 32, 3]]),
        described(tensors=[["a", "F32", [True] * 3, 32, 3]]),
        described(tensors=[["a", "F32", [1] * 65, 32, 3]]),
        described(tensors=[["a", "F32", [320], 32.0, 3]]),
        described(tensors=[["a", "F32", [320], 32, "3"]]),
        described(tensors=[["a", "I8", [320], 32, 3]]),
        described(tensors=[["a", "F32", [300], 30, 3], ["a", "F32", [20], 2, 3]]),
        described(tensors=[[["a"], "F32", [320], 32, 3]]),
        described(tensors=[["a", "F32", [320]]]),
        described(tensors=7),
        described(tied={"b": "c"}),
        described(tied={"b": ["a"]}),
        described(config=3),
    ],
)
def test_lying_descriptions_are_refused(blobs, description):
    with pytest.raises(ValueError, match="description"):
        TernaryUpdate.unpack(forged(blobs["golomb"], description))


@pytest.mark.parametrize(
    "lie",
    [
        {"nonzero": (8, 24)},
        {"nonzero": (35, -3)},
        {"nonzero": (32, 0)},
        {"sizes": (100, 220)},
        {"shifts": (63, 2)},
        {"shifts": (-1, 2)},
        {"shifts": (3, 3)},
    ],
)
@pytest.mark.parametrize("coding", CODINGS)
def test_lies_about_the_tensors_are_refused(blobs, lie, coding):
    assert TernaryUpdate.unpack(forged(blobs[coding], described())).pack(coding)
    if (coding, lie) == ("bitmask", {"shifts": (3, 3)}):
        return  # the masks need no low bits
    with pytest.raises(ValueError, match=r"stretch|gap code"):
        TernaryUpdate.unpack(forged(blobs[coding], described(tensors=rows(**lie))))


def test_masks_that_overlap_or_exceed_the_size_are_refused(blobs):
    body = bytearray(blobs["bitmask"][: -CHECKSUM.size])
    body[-40:] = body[-80:-40]
    with pytest.raises(ValueError, match="two masks do not describe"):
        TernaryUpdate.unpack(signed(body))
    odd = compress({"a": torch.randn(13)}, density=1.0).pack("bitmask")
    with pytest.raises(ValueError, match="two masks do not describe"):
        TernaryUpdate.unpack(signed(odd[: -CHECKSUM.size - 1] + bytes([odd[-CHECKSUM.size - 1] ^ 0x80])))


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=9), st.sampled_from(CODINGS), st.booleans())
@example(0, b"", "golomb", True)
@settings(max_examples=200, deadline=None)
def test_forged_bytes_raise_value_errors_or_read_back_as_what_they_are(blobs, place, patch, coding, header):
    body = bytearray(blobs[coding][: -CHECKSUM.size])
    place %= HEADER.size if header else len(body)
    body[place : place + len(patch)] = patch
    blob = signed(body)
    tracemalloc.start()
    try:
        update = TernaryUpdate.unpack(blob)
    except ValueError:
        update = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000
    if update is not None:
        assert TernaryUpdate.unpack(update.pack(coding)).pack() == update.pack()


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(ValueError, match="packed"):
        TernaryUpdate.unpack(data)
    with pytest.raises(ValueError, match="packed"):
        TernaryUpdate.unpack(b"COMPEFT\x01" + data)


def test_a_huge_empty_update_is_read_without_its_memory(blobs):
    text = described(tensors=[["a", "F32", [2**60], 0, 0]])
    body = HEADER.pack(b"COMPEFT", 1, 0, 2**60, 0, 0, 0.0, len(text))
    tracemalloc.start()
    update = TernaryUpdate.unpack(signed(body + text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert update.size == 2**60
    assert peak < 100_000


# --------------------------------------------------------------------------------------------------------------------
# Arithmetic, baselines, merging


def test_dot_hamming_and_sums_equal_the_dense_ones():
    first = compress(random_state(8, a=(PIECE + 5,), b=(90,)), density=0.3)
    second = compress(random_state(9, a=(PIECE + 5,), b=(90,)), density=0.6, alpha=2.0)
    x, y = flat(first.residual()), flat(second.residual())
    assert first.dot(second) == pytest.approx(x @ y, rel=1e-9)
    assert first.dot(first) == pytest.approx(x @ x, rel=1e-9)
    assert first.hamming(second) == np.abs(np.sign(x) - np.sign(y)).sum()
    np.testing.assert_allclose(flat(first + second), x + y, rtol=1e-6)
    weights = random_state(10, a=(PIECE + 5,), b=(90,))
    np.testing.assert_allclose(flat(weights + first), flat(weights) + x, rtol=1e-5, atol=1e-6)
    assert set((weights | {"other": torch.ones(1)}) + first) == {"a", "b", "other"}
    with pytest.raises(ValueError, match=r"'b' has shape \(90,\) in one update but is not in the other"):
        first.dot(compress({"a": torch.randn(PIECE + 5)}))
    with pytest.raises(TypeError, match="TernaryUpdate"):
        first.dot(3)


def test_baselines():
    state, base = random_state(11), random_state(12)
    tau = flat(state) - flat(base)
    kept = expected_ternary(tau.astype(np.float32), 0.3) != 0
    np.testing.assert_allclose(flat(pruned(state, base, 0.3, "full")), flat(base) + tau * kept, atol=1e-6)
    doubled = flat(pruned(state, base, 0.3, "full", scale=2.0))
    np.testing.assert_allclose(doubled, flat(base) + 2 * tau * kept, atol=1e-6)
    assert sign_only(state).density == 1.0
    assert stc(state, density=0.3).pack() == compress(state, density=0.3, alpha="stc").pack()
    assert (original({"a": torch.tensor([1 + 2**-12, 2.0])})["a"] == torch.tensor([1.0, 2.0])).all()
    for bits in (2, 4, 8):
        rounded = uniform_quant(state, base, bits, "full")
        for key in state:
            residual = state[key] - base[key]
            step = residual.abs().max() / (2 ** (bits - 1) - 1)
            levels = (rounded[key] - base[key]) / step
            torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
            assert (rounded[key] - state[key]).abs().max() <= step / 2 * 1.001
    grid = {"a": torch.tensor([-7.0, 3.0, 0.0, 7.0])}
    assert torch.equal(uniform_quant(grid, bits=4)["a"], grid["a"])


def test_merging_by_hand():
    base = {"a": torch.tensor([10.0, 10, 10, 10, 10]), "untouched": torch.tensor([1, 2])}
    taus = [torch.tensor([1.0, 1, 1, 0, 2]), torch.tensor([3.0, -2, 0, 0, -2]), torch.tensor([2.0, -2, 0, 0, 0])]
    experts = [{"a": tau} for tau in taus]
    summed = merge(base, experts, "arithmetic", lam=0.5)
    assert summed["a"].tolist() == [13.0, 8.5, 10.5, 10.0, 10.0]
    assert summed["untouched"] is base["untouched"]
    # means of the entries that agree with the elected sign; +2 - 2 elects none
    assert merge(base, experts, "ties")["a"].tolist() == [12.0, 8.0, 11.0, 10.0, 10.0]
    assert merge(base, experts, "arithmetic", weights=[1, 0, -1])["a"].tolist() == [9.0, 13.0, 11.0, 10.0, 12.0]


def test_ties_agrees_with_peft():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    states = [random_state(seed, a=(50, 4)) for seed in range(20, 24)]
    updates = [compress(state, density=0.3, alpha=alpha) for state, alpha in zip(states, (1, 1.1, 0.7, 2), strict=True)]
    dense = [update.residual()["a"] for update in updates]
    theirs = merge_utils.ties(dense, torch.ones(4), 1.0)
    torch.testing.assert_close(merge(None, updates, "ties")["a"], theirs)
    base = {"a": torch.ones(50, 4)}
    torch.testing.assert_close(merge(base, [{"a": tau} for tau in dense], "ties", lam=0.3)["a"], 1 + 0.3 * theirs)
    ia3 = [compress({"a": 1 + state["a"]}, kind="ia3") for state in states]
    torch.testing.assert_close(merge(None, ia3, "ties", lam=0.0)["a"], torch.ones(50, 4))


def test_learned_weights_find_the_combination():
    updates = [compress(random_state(seed, a=(200,)), density=0.5) for seed in range(5)]
    truth = np.array([1.2, -0.4, 0.0, 0.7, 0.0])
    target = merge(None, updates, "arithmetic", weights=truth)["a"]

    def loss(parameters):
        return float((parameters["a"] - target).square().mean())

    found = learn_weights(None, updates, loss, evaluations=400, penalty=0.0, random_state=0)
    np.testing.assert_allclose(found.weights, truth, atol=0.05)
    assert (np.diff(found.history) <= 0).all()
    assert len(found.history) == 400
    assert found.loss == loss(found.state_dict)
    again = learn_weights(None, updates, loss, evaluations=400, penalty=0.0, random_state=0)
    np.testing.assert_array_equal(found.weights, again.weights)
    held = learn_weights(None, updates, loss, evaluations=60, bound=0.1, random_state=0)
    assert np.abs(held.weights).max() <= 0.1
    sparse = learn_weights(None, updates, loss, evaluations=60, penalty=1e3, random_state=0)
    assert (sparse.weights == 0).all()


# --------------------------------------------------------------------------------------------------------------------
# Tuning


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(40))


def test_tuner_finds_the_scale_that_validates_best_and_puts_the_model_back():
    model, state = Line(), random_state(13, w=(40,))
    with torch.no_grad():
        model.w.fill_(7.0)
    sigma = flat(state).std(ddof=1)
    calls = []

    def evaluate(module):
        calls.append(1)
        return -abs(module.w.abs().max().item() - 3.0 * sigma) - 1e-3 * module.w.count_nonzero().item()

    tuner = ComPEFTTuner(densities=[0.2, 0.1], alphas=[1, 2, 3, 4, "stc"]).fit(model, state, evaluate)
    assert (tuner.density_, tuner.alpha_) == (0.1, 3.0)
    assert tuner.update_.pack() == compress(state, density=0.1, alpha=3.0).pack()
    assert len(calls) == len(tuner.scores_) == 10
    assert tuner.score_ == max(row["score"] for row in tuner.scores_)
    assert (model.w == 7.0).all()


def test_tuner_breaks_ties_by_density_then_by_nearness_to_one():
    model, state = Line(), random_state(14, w=(40,))
    tuner = ComPEFTTuner(densities=[0.5, 0.1], alphas=[5, 0.5, 1.25]).fit(model, state, lambda module: 1.0)
    assert (tuner.density_, tuner.alpha_) == (0.1, 1.25)


def test_tuner_refuses_nonsense_and_restores_after_an_error():
    model, state = Line(), random_state(15, w=(40,))
    with pytest.raises(ValueError, match="finite score, got nan"):
        ComPEFTTuner().fit(model, state, lambda module: math.nan)
    assert (model.w == 0).all()
    with pytest.raises(ValueError, match="at least one value"):
        ComPEFTTuner(alphas=[]).fit(model, state, lambda module: 1.0)
    with pytest.raises(ValueError, match=r"densities must be above 0 and at most 1, got 20"):
        ComPEFTTuner(densities=[20]).fit(model, state, lambda module: 1.0)
    with pytest.raises(ValueError, match=r"'other' has shape .* in state_dict but is not in the model"):
        ComPEFTTuner().fit(model, {"other": torch.randn(4)}, lambda module: 1.0)


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_files_give_the_same_update_as_memory(tmp_path):
    for name, dtype in [("f4", torch.float32), ("f2", torch.float16), ("b2", torch.bfloat16), ("f8", torch.float64)]:
        tuned, base = (random_state(seed, dtype=dtype, a=(PIECE + 9,), b=(3, 4), c=()) for seed in (16, 17))
        save_file(tuned | {"steps": torch.tensor([5])}, tmp_path / f"{name}.safetensors")
        save_file(base | {"steps": torch.tensor([1])}, tmp_path / f"{name}-base.safetensors")
        for kind, start, start_file in [("lora", None, None), ("full", base, tmp_path / f"{name}-base.safetensors")]:
            with pytest.warns(UserWarning, match="left out, not of floating point: steps"):
                update = pack_file(tmp_path / f"{name}.safetensors", tmp_path / "packed", start_file, 0.3, 1.5, kind)
            assert update.pack() == compress(tuned, start, 0.3, 1.5, kind).pack()
            assert (tmp_path / "packed").read_bytes() == update.pack()
            assert read_packed(tmp_path / "packed").pack() == update.pack()
            unpack_file(tmp_path / "packed", tmp_path / "out.safetensors", start_file)
            expected = update.to_state_dict(base=start)
            rebuilt = load_file(tmp_path / "out.safetensors")
            if start is not None:
                assert rebuilt.pop("steps").item() == 1
            assert rebuilt.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(rebuilt[key], tensor)
                assert rebuilt[key].dtype == dtype
    unpack_file(tmp_path / "packed", tmp_path / "out.safetensors", start_file, torch.float16)
    assert load_file(tmp_path / "out.safetensors")["a"].dtype == torch.float16
    assert not list(tmp_path.glob("*.part"))


def test_sharded_checkpoints_and_tied_names(tmp_path):
    tuned = random_state(18)
    for name, keys in [("one", ["a", "c"]), ("two", ["b"])]:
        save_file({key: tuned[key] for key in keys}, tmp_path / f"{name}.safetensors")
    weight_map = {"a": "one.safetensors", "c": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert compress_file(tmp_path, kind="lora").pack() == compress(tuned).pack()

    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    (tmp_path / "packed").write_bytes(compress(shared.state_dict(), density=1.0).pack())
    unpack_file(tmp_path / "packed", tmp_path / "tied.safetensors")
    load_model(shared, tmp_path / "tied.safetensors")  # safetensors' own reader knows where the tied name went


def test_memory_is_that_of_the_packed_result_and_less_than_one_tensor(tmp_path):
    largest = 4 * 2**20
    tensors = {f"t{i}": torch.randn(2**20, generator=torch.Generator().manual_seed(i)) for i in range(16)}
    save_file(tensors, tmp_path / "big.safetensors")
    del tensors
    tracemalloc.start()
    pack_file(tmp_path / "big.safetensors", tmp_path / "packed", density=0.05, kind="lora")
    packing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    unpack_file(tmp_path / "packed", tmp_path / "out.safetensors")
    unpacking = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    packed = os.path.getsize(tmp_path / "packed")
    assert os.path.getsize(tmp_path / "out.safetensors") > 15 * largest
    assert packing < largest + packed
    assert unpacking < largest + packed


def test_bad_files_are_named(tmp_path, monkeypatch):
    state = random_state(19)
    save_file(state, tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a safetensors file"):
        compress_file(tmp_path / "bad.safetensors", kind="lora")
    with pytest.raises(FileNotFoundError, match="path must be a safetensors file or a folder"):
        compress_file(tmp_path / "nothing", kind="lora")
    with pytest.raises(ValueError, match="kind must be one of"):
        compress_file(tmp_path / "good.safetensors")
    with pytest.raises(ValueError, match="is empty"):
        read_packed(tmp_path / "empty")
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "eight.safetensors")
    with pytest.raises(ValueError, match=r"'a' in path must be of type .*, got F8_E4M3"):
        compress_file(tmp_path / "eight.safetensors", kind="lora")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an index of shards"):
        compress_file(tmp_path, kind="lora")

    pack_file(tmp_path / "good.safetensors", tmp_path / "packed", kind="lora")
    with pytest.raises(ValueError, match="takes no base"):
        unpack_file(tmp_path / "packed", tmp_path / "out.safetensors", tmp_path / "good.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        unpack_file(tmp_path / "packed", tmp_path / "out")
    with pytest.raises(ValueError, match="dtype must be one of"):
        unpack_file(tmp_path / "packed", tmp_path / "out.safetensors", dtype=torch.int8)
    save_file(random_state(0), tmp_path / "start.safetensors")
    pack_file(tmp_path / "good.safetensors", tmp_path / "relative", tmp_path / "start.safetensors", kind="lora")
    with pytest.raises(ValueError, match="difference from a base"):
        unpack_file(tmp_path / "relative", tmp_path / "out.safetensors")
    save_file(state | {"d": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"'d' is not in .* but has shape"):
        unpack_file(tmp_path / "relative", tmp_path / "out.safetensors", tmp_path / "more.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match="but only 10 are free"):
        unpack_file(tmp_path / "packed", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_command_line(tmp_path, capsys):
    state = random_state(20)
    save_file(state, tmp_path / "adapter.safetensors")
    packed, out = str(tmp_path / "packed"), str(tmp_path / "out.safetensors")
    arguments = ["--kind", "lora", "--density", "0.4", "--alpha", "stc"]
    assert main(["pack", str(tmp_path / "adapter.safetensors"), packed, *arguments]) == 0
    assert "times smaller than in 16 bits" in capsys.readouterr().out
    assert main(["inspect", packed]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["size"] == 166
    assert said["nonzero"] == 66
    assert said["nbytes"] == os.path.getsize(packed)
    assert said == json.loads(json.dumps(inspect_file(packed)))
    assert main(["unpack", packed, out, "--dtype", "F64"]) == 0
    assert torch.equal(load_file(out)["a"].float(), stc(state, density=0.4).to_state_dict()["a"])
    assert main(["unpack", str(tmp_path / "adapter.safetensors"), out]) == 1
    assert capsys.readouterr().err.startswith("unpack: not a packed update")
    assert main(["pack", str(tmp_path / "adapter.safetensors"), packed, "--kind", "lora", "--density", "40"]) == 1
    assert "density must be above 0 and at most 1, got 40.0" in capsys.readouterr().err


def test_command_line_runs_as_a_module(tmp_path, monkeypatch, capsys):
    update = compress(random_state(21))
    (tmp_path / "packed").write_bytes(update.pack())
    monkeypatch.setattr(sys, "argv", ["compeft", "inspect", str(tmp_path / "packed")])
    monkeypatch.delitem(sys.modules, "workingpapers.federated.compeft.__main__")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("workingpapers.federated.compeft", run_name="__main__")
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["nonzero"] == update.nonzero


# --------------------------------------------------------------------------------------------------------------------
# PEFT


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()))


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    return peft.get_peft_model(Tiny(), config)


def test_peft_adapters_round_trip_through_models_and_folders(lora, tmp_path):
    peft = pytest.importorskip("peft")
    inputs = torch.randn(5, 8)
    adapter = from_peft(lora)
    update = compress(adapter, density=0.4)
    lora.save_pretrained(tmp_path / "adapter")
    assert pack_file(tmp_path / "adapter", tmp_path / "packed", density=0.4).scale == update.scale
    into_peft(lora, update)
    expected = lora(inputs)
    for key, tensor in from_peft(lora).items():
        assert torch.equal(tensor, update.to_state_dict()[key])

    unpack_file(tmp_path / "packed", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config == json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    model = Tiny()
    model.load_state_dict(
        {
            key.replace("base_layer.", ""): value
            for key, value in lora.get_base_model().state_dict().items()
            if "lora" not in key
        }
    )
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "again")
    torch.testing.assert_close(loaded(inputs), expected)


def test_tuner_works_on_peft_models(lora):
    before = {key: tensor.clone() for key, tensor in from_peft(lora).items()}
    inputs = torch.randn(20, 8)
    target = lora(inputs).detach()
    tuner = ComPEFTTuner(densities=[0.5, 1.0]).fit(
        lora, before, lambda model: -float((model(inputs) - target).detach().square().mean())
    )
    assert tuner.score_ > min(row["score"] for row in tuner.scores_)
    for key, tensor in from_peft(lora).items():
        assert torch.equal(tensor, before[key])


def test_ia3_and_what_did_not_start_at_a_known_value(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])
    ia3 = peft.get_peft_model(Tiny(), config)
    with pytest.warns(UserWarning, match="only 0 non-zeros"):
        assert compress(from_peft(ia3), kind="ia3").nonzero == 0  # a new adapter does nothing
    with pytest.raises(ValueError, match="of kind 'ia3', the update of kind 'lora'"):
        into_peft(ia3, compress({"a": torch.randn(9)}))

    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"], init_lora_weights=False)
    headed = peft.get_peft_model(Tiny(), config)
    headed.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"head.* did not start where a lora adapter does nothing"):
        adapter = from_peft(headed)
    with pytest.raises(ValueError, match=r"head.* did not start where a lora adapter does nothing"):
        compress_file(tmp_path)
    save_file({key: torch.zeros_like(tensor) for key, tensor in adapter.items()}, tmp_path / "initial.safetensors")
    assert compress_file(tmp_path, tmp_path / "initial.safetensors").size == sum(t.numel() for t in adapter.values())
    with pytest.raises(ValueError, match="kind must be 'lora'"):
        compress_file(tmp_path, kind="ia3")


def test_into_peft_changes_nothing_when_it_does_not_fit(lora):
    before = {key: tensor.clone() for key, tensor in from_peft(lora).items()}
    key = next(iter(before))
    with pytest.raises(ValueError, match=r"has shape \(3, 3\) in the update but has shape \(2, 8\) in the model"):
        into_peft(lora, compress({key: torch.randn(3, 3)}))
    with pytest.raises(ValueError, match="adapter_name must be one of 'default', got 'other'"):
        from_peft(lora, "other")
    with pytest.raises(TypeError, match="must be a PEFT model, got Tiny"):
        from_peft(Tiny())
    for key, tensor in from_peft(lora).items():
        assert torch.equal(tensor, before[key])


# --------------------------------------------------------------------------------------------------------------------
# Manners


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"density": 0.0}, ValueError, "density must be above 0 and at most 1, got 0.0"),
        ({"density": 20}, ValueError, "density must be above 0 and at most 1, got 20"),
        ({"density": "0.2"}, TypeError, "density must be a number"),
        ({"alpha": 0.0}, ValueError, "alpha must be above 0, got 0.0"),
        ({"alpha": math.inf}, ValueError, "alpha must be above 0, got inf"),
        ({"alpha": "best"}, ValueError, "alpha must be a positive number or 'stc', got 'best'"),
        ({"alpha": 1e39}, ValueError, "float32 cannot hold it"),
        ({"kind": "dora"}, ValueError, "kind must be one of 'lora', 'ia3', 'full', got 'dora'"),
        ({"kind": "full"}, ValueError, "kind='full' needs base="),
        ({"state_dict": {}}, ValueError, "at least 2 floating-point entries, got 0"),
        ({"state_dict": [1]}, TypeError, "state_dict must map names to tensors, got list"),
        ({"state_dict": {"a": 1.0}}, TypeError, "state_dict must map names to tensors, got 'a': float"),
        ({"state_dict": {"a": torch.tensor([1.0, math.nan])}}, ValueError, "a must be finite, got NaN or infinity"),
        ({"state_dict": {"a": torch.tensor([1.0, -math.inf])}}, ValueError, "a must be finite"),
        ({"state_dict": {"a": torch.ones(9)}}, ValueError, "no scale: .* all its entries are equal"),
        ({"state_dict": {"a": torch.ones(9).to(torch.float8_e5m2)}}, ValueError, "state_dict\\['a'\\] must be a dense"),
        ({"state_dict": {"a": torch.ones(9, device="meta")}}, ValueError, "on meta"),
        (
            {"base": {"a": torch.ones(3)}},
            ValueError,
            r"'a' has shape \(8,\) in state_dict but has shape \(3,\) in base",
        ),
        ({"base": {}}, ValueError, r"'a' has shape \(8,\) in state_dict but is not in base"),
        ({"base": {"a": torch.ones(8), "b": torch.ones(1)}}, ValueError, "'b' is not in state_dict"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {"state_dict": {"a": torch.arange(8.0)}, "density": 0.5, "alpha": 1.0, "kind": "lora"}
    with pytest.raises(error, match=message):
        compress(**(good | change))


def test_bad_use_of_an_update_is_named():
    absolute = compress(random_state(22))
    relative = compress(random_state(22), random_state(23), kind="full")
    with pytest.raises(ValueError, match="pass the initial parameters as base="):
        relative.to_state_dict()
    with pytest.raises(ValueError, match="takes no base"):
        absolute.to_state_dict(base=random_state(22))
    with pytest.raises(ValueError, match=r"'b' has shape .* in the update but is not in base"):
        relative.to_state_dict(base={"a": torch.ones(40, 3)})
    with pytest.raises(ValueError, match=r"floating-point torch\.dtype"):
        absolute.to_state_dict(torch.int8)
    with pytest.raises(ValueError, match="coding must be one of"):
        absolute.pack("zip")
    with pytest.raises(TypeError, match="blob must be bytes, got str"):
        TernaryUpdate.unpack("COMPEFT")
    with pytest.raises(TypeError):
        absolute + 3
    with pytest.raises(ValueError, match="at least one expert"):
        merge(None, [])
    with pytest.raises(ValueError, match="base is needed"):
        merge(None, [relative])
    with pytest.raises(ValueError, match="one for each of 1 experts, got 2"):
        merge(None, [absolute], weights=[1, 2])
    with pytest.raises(ValueError, match=r"weights\[0\] must be finite, got nan"):
        merge(None, [absolute], weights=[math.nan])
    with pytest.raises(ValueError, match=r"is not in updates\[1\]"):
        merge(None, [absolute, compress({"a": torch.randn(40, 3)})])
    with pytest.raises(ValueError, match="method must be one of"):
        merge(None, [absolute], "dare")
    with pytest.raises(ValueError, match="loss must be finite"):
        learn_weights(None, [absolute], lambda parameters: math.nan)
    with pytest.raises(ValueError, match="bits must be at least 2"):
        uniform_quant(random_state(22), bits=1)


def test_arguments_stay_as_they_are_and_the_result_is_deterministic():
    state = {key: tensor.requires_grad_() for key, tensor in random_state(24).items()}
    base = random_state(25)
    kept = [{key: tensor.detach().clone() for key, tensor in passed.items()} for passed in (state, base)]
    update = compress(state, base, 0.3, 2.0, "full")
    assert update.pack() == compress(dict(reversed(state.items())), base, 0.3, 2.0, "full").pack()
    update.to_state_dict(base=base)
    merge(base, [update, update])
    pruned(state, base, kind="full")
    uniform_quant(state, base, kind="full")
    base + update
    for passed, before in zip((state, base), kept, strict=True):
        assert all(torch.equal(passed[key].detach(), before[key]) for key in before)


def test_strided_tensors_are_read_in_row_major_order():
    tensor = torch.randn(30, 20).t()
    assert compress({"a": tensor}).pack() == compress({"a": tensor.contiguous()}).pack()


def test_the_header_is_as_documented():
    blob = compress({"a": torch.arange(100.0)}, density=0.1).pack()
    magic, version, coding, size, nonzero = struct.unpack("<7sBBQQ", blob[:25])
    assert (magic, version, coding, size, nonzero) == (b"COMPEFT", 1, 0, 100, 10)
