import torch

from tests.parallel.test_moving import *


def test_diag(ranks, tmp_path):
    chain = [SEQUENCE, PIPELINE_TENSOR, ZERO_3, PIPELINE_TENSOR, ONE, PIPELINE_TENSOR, PIPELINE, TENSOR, SEQUENCE, DATA]
    settings = FAMILIES
    alone = course_alone(settings, 16)
    start, unint = 0, alone[:AFTER]
    while start < len(chain):
        size = chain[start][0]
        found = ranks(size).run(
            moves, directory=tmp_path, first=start, splits=[chain[start][1]], settings=settings, timeout=600
        )
        c = torch.tensor(found[0][0]).double()
        u = torch.tensor(unint).double()
        al = torch.tensor(alone[start : start + 6]).double()
        d = ((c[:AFTER] - u) / u).abs()
        da = ((c - al) / al).abs()
        print(
            start,
            chain[start][1],
            " pair norm",
            [f"{x:.1e}" for x in d[:, 2]],
            "loss",
            [f"{x:.1e}" for x in d[:, 0]],
            " vs alone norm",
            [f"{x:.1e}" for x in da[:, 2]],
            "loss max %.1e" % da[:, 0].max(),
            flush=True,
        )
        unint = found[0][0][1:]
        start += 1
