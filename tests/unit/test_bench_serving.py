"""bench.serving on a tiny model: the rows have what they promise."""

import pytest

from bench import serving


def test_a_server_is_measured_and_attacked(tmp_path):
    pytest.importorskip("mlx", reason="mlx is not installed")
    run = serving.write_model(tmp_path / "model", dim=32, layers=1, heads=2, context_length=128)
    with serving.Server(run, "mlx", 4, "--max-queue", "16", "--no-log") as server:
        row = serving.measure(server, clients=6)
        assert row["tokens_per_second"] > 0
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_p95"]
        assert 0 < row["between_tokens_ms_p50"] <= row["between_tokens_ms_p95"]
        assert server.metric("generation_tokens_total") == (1 + serving.WARM_UPS) * 6 * serving.EACH * serving.TOKENS
        row = serving.hostile(server, 60)
        assert row["requests"] == sum(row["ends"].values()) == 60
        assert row["failed"] == 0
        assert len(row["memory_mib"]) == 3
