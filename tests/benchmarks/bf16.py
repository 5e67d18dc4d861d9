"""bf16 layers without instructions for bf16: as products in fp32 of what was rounded, beside PyTorch's own operator.

Layers of the demo's shapes on 4,096 rows, one thread; both ways are held against sums in fp64 before anything is timed.
Prints one JSON object as its last line: by shape `speedup` (the operator's time / that of the products), medians over
repeats in turn; `equal`, the least share of outputs in which both agree; `has_instructions`, whether this CPU has some:
then lowprec takes the operator.
"""

import json
import statistics
import time

import torch
from sizes import sized
from torch.nn.functional import linear

from lowprec.ops.linear import _Plain, _WidenedBf16, has_bf16_instructions

NUM_ROWS, REPEATS = sized((4096, 9), (64, 1))
SHAPES = ((64, 13), (16, 64), (128, 367), (64, 128))  # out, in


def seconds_of(layer: torch.nn.Module, x: torch.Tensor) -> float:
    began = time.perf_counter()
    layer(x)
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    speedups, equal = {}, 1.0
    with torch.inference_mode():
        for num_out, num_in in SHAPES:
            x = torch.randn(NUM_ROWS, num_in, generator=generator).relu()
            weight = (torch.randn(num_out, num_in, generator=generator) / num_in**0.5).bfloat16()
            bias = torch.randn(num_out, generator=generator).bfloat16()
            ways = _Plain(weight, bias), _WidenedBf16(weight, bias)
            exact = linear(x.bfloat16().double(), weight.double(), bias.double()).bfloat16().float()
            found = [way(x) for way in ways]
            assert all(float((one == exact).float().mean()) > 0.999 for one in found)
            equal = min(equal, float((found[0] == found[1]).float().mean()))
            times = [[seconds_of(way, x) for way in ways] for _ in range(REPEATS)]
            speedups[f"{num_out}x{num_in}"] = round(statistics.median(a / b for a, b in times), 1)
    print(json.dumps({"speedup": speedups, "equal": round(equal, 5), "has_instructions": has_bf16_instructions()}))


if __name__ == "__main__":
    main()
