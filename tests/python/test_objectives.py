"""The file that the Rust tests of the objectives read is what its script computes."""

import json

import numpy as np
import objective_reference as reference


def test_the_reference_is_current():
    stored = json.loads(reference.FILE.read_text())
    computed = reference.reference()
    assert stored.keys() == computed.keys()
    assert stored["gradients"].keys() == computed["gradients"].keys()
    for name, values in computed["gradients"].items():
        np.testing.assert_allclose(stored["gradients"][name], values, rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(stored["x0"], computed["x0"], rtol=1e-12)


def test_the_identity_behind_sid_and_sim_holds_on_gaussians():
    """E (s_f - grad log q) . v(x_t) = 0 where the fake score is exact: what both methods are built on."""
    rng = np.random.default_rng(0)
    n, theta, sd, sigma = 2_000_000, 0.7, 0.6, 1.3
    x = theta + sd * rng.standard_normal(n)
    e = rng.standard_normal(n)
    x_t = x + sigma * e
    fake = -(x_t - theta) / (sd**2 + sigma**2)
    assert abs(np.mean((fake + e / sigma) * np.tanh(x_t))) < 3e-3
