"""KL divergence between the policy and its reference, per token, and the controller of its coefficient.

With `d = log pi(a) - log ref(a)` of a token `a` sampled from pi (Schulman 2020, "Approximating KL divergence"):

    kind   estimate           expectation under pi                  gradient's expectation (through d, a held fixed)
    k1     d                  KL(pi || ref)                         0
    k2     d^2 / 2            about KL(pi || ref) if d is small     grad KL(pi || ref)
    k3     exp(-d) - 1 + d    KL(pi || ref), each term >= 0         grad KL(ref || pi)
    full   sum_a pi(a) d(a)   KL(pi || ref), exactly                grad KL(pi || ref)

As a penalty in the reward, where only the value counts, k1, k3 and "full" are unbiased. As a term of the loss, where
only the gradient counts, "k2" and "full" lower KL(pi || ref), "k3" lowers the other direction (as GRPO does), and "k1"
does nothing but add noise.
"""

import jax
import jax.numpy as jnp

KL_ESTIMATORS = ("k1", "k2", "k3", "full")
MAX_KL_ERROR = 0.2  # Ziegler et al. 2019, section 2.2


def kl_estimate(
    kind: str, logps: jax.Array, ref_logps: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """The sampled estimators k1, k2, k3 of KL(pi || ref); the formulas are at the head of this module.

    Args:
      kind: static, "k1", "k2" or "k3" ("full" needs all logits: `full_kl`).
      logps, ref_logps: [...], log-probs of the sampled tokens under the policy and the reference, at one temperature.
      mask: [...]: where it is 0 the estimate is 0, and so is its gradient, even of a NaN. None: all count.

    Returns:
      float32 [...]. Differentiable in both arguments. A log-ratio below -88 gives an infinite k3, which is not hidden.

    Raises:
      ValueError: for another kind.
    """
    d = jnp.asarray(logps, jnp.float32) - jnp.asarray(ref_logps, jnp.float32)
    if mask is not None:
        d = jnp.where(jnp.asarray(mask) > 0, d, 0.0)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * jnp.square(d)
    if kind == "k3":
        return jnp.expm1(-d) + d
    hint = "; `full` is computed from logits by `full_kl`" if kind == "full" else ""
    raise ValueError(f"unknown KL estimator `{kind}` of sampled tokens; use k1, k2 or k3{hint}")


def full_kl(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
    """KL(pi || ref) of whole distributions, sum over the vocabulary of `pi (log pi - log ref)`.

    Args:
      logits, ref_logits: [..., V], already divided by the temperature. A token that both rule out (-inf) adds 0; one
        that the reference alone rules out makes the divergence infinite.

    Returns:
      float32 [...], at least 0 up to rounding; differentiable in both arguments.
    """
    logp = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    ref = jax.nn.log_softmax(jnp.asarray(ref_logits, jnp.float32), axis=-1)
    possible = logp > -jnp.inf
    d = jnp.where(possible, logp, 0.0) - jnp.where(possible, ref, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(logp) * d, 0.0), axis=-1)


def adaptive_kl(
    coef: jax.Array | float,
    kl: jax.Array | float,
    target: jax.Array | float,
    horizon: jax.Array | float,
    episodes: jax.Array | float,
) -> jax.Array:
    """The coefficient for the next iteration (Ziegler et al. 2019, section 2.2):

        coef' = coef (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon)

    Args:
      coef: of this iteration. kl: this iteration's mean KL per response (`objective/kl`). target: the KL to hold.
      horizon: episodes over which a full error would change the coefficient by 20 %. episodes: responses in this
        iteration.

    Returns:
      float32 scalar.
    """
    coef, kl, target, horizon, episodes = (
        jnp.asarray(x, jnp.float32) for x in (coef, kl, target, horizon, episodes)
    )
    error = jnp.clip(kl / target - 1.0, -MAX_KL_ERROR, MAX_KL_ERROR)
    # With very many episodes per iteration, the factor must not pass 0 and turn the penalty into a bonus.
    return coef * jnp.maximum(1.0 + error * episodes / horizon, 0.0)
