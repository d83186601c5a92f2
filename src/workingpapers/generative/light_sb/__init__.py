"""Light Schrödinger bridge: entropic optimal transport between two samples, in closed form after one short fit.

Given unpaired samples of p0 and p1 and the volatility epsilon of a Wiener process, finds the plan that minimises
E|x - y|^2 / 2 - epsilon H(plan) with these marginals, and the diffusion dX = g(X, t) dt + sqrt(epsilon) dW on [0, 1]
that carries p0 to p1 along it. The plan factorises as u(x) exp(<x, y> / epsilon) v(y), and only v is modelled:

    v(y) = sum_k alpha_k N(y | r_k, epsilon S_k).

Normaliser, conditional plan, objective, drift and samples follow without simulation, inner loop or network:

    c(x) = int exp(<x, y> / epsilon) v(y) dy = sum_k alpha_k exp((x' S_k x + 2 r_k' x) / (2 epsilon))
    plan(y | x) = sum_k w_k(x) N(y | r_k + S_k x, epsilon S_k),   w_k(x) = the k-th term of c(x), divided by c(x)
    L = E log c(x0) - E log v(x1) = KL(bridge || model) + a constant
    g(x, t) = sum_k w_k(x, t) M_k^{-1} (r_k + (S_k - I) x),   M_k = (1 - t) I + t S_k,
    w_k(x, t) ~ alpha_k |M_k|^{-1/2} exp(b_k / (2 epsilon)),
    b_k = x' M_k^{-1} (S_k - I) x + 2 r_k' M_k^{-1} x - t r_k' M_k^{-1} r_k

The drift is the paper's with its terms in 1 / (1 - t) cancelled by hand, so that it stays accurate as t -> 1.

For compactly supported p0 and p1 a large enough mixture comes within any KL divergence of the bridge; the estimation
error falls as 1/sqrt(n) + 1/sqrt(m). Where only the given points matter, Sinkhorn (POT) solves their problem exactly;
for images, or for plans too intricate for some hundred Gaussians, a neural bridge has more capacity. The bridge from
p1 back to p0 is another model: fit again with the samples exchanged.

Reference: Korotin, Gushchin and Burnaev, "Light Schrödinger Bridge", ICLR 2024, arXiv 2310.01174.
"""

from workingpapers.generative.light_sb.estimator import LightSB as LightSB
from workingpapers.generative.light_sb.estimator import energy_distance as energy_distance
from workingpapers.generative.light_sb.potential import LightSBPotential as LightSBPotential
