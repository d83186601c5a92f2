"""Learning-rate schedules derived from bounds on the last iterate, and refined by the gradient norms of an earlier run.

For whoever must choose the shape of a schedule for a run whose length T is known. Without any information the theory
of the last iterate supports linear decay to zero. After one ordinary run whose gradient norms were logged, `refine`
gives the schedule for the next run of the same length: large norms at the start become warm-up, norms that fall
towards the end keep the rate high for longer and then drop it sharply, norms that rise make it decay early. The peak
rate is still tuned.

    from workingpapers.training.refined_schedules import GradNormRecorder, LinearDecay, RefinedLR, refine

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder, scheduler = GradNormRecorder(optimizer), LinearDecay(optimizer, total_steps)
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()                                     # the recorder logs here
        scheduler.step()
    schedule = refine(recorder.norms)                        # next time: RefinedLR(optimizer, schedule)

For Adam and other coordinate-wise methods log the l1 norm, `GradNormRecorder(optimizer, ord=1)`, and give it to
`refine(..., kind="l1")`. With gradient clipping call `recorder()` after the backward pass and before clipping.

Refinement costs one extra full run, with a reasonable schedule (linear or cosine), the same batch size and the same
length. The theory is of convex functions: with momentum, weight decay or normalisation layers it is a guide without
guarantee. Where a problem is interpolated its norms go to zero and the refined schedule moves nearly all of the rate
to the last steps: `refine` warns, and linear decay is the better choice. Where T is unknown use averaging of the
iterates instead of a schedule, for an unknown peak rate a method that estimates it.

Reference: Defazio, Cutkosky, Mehta and Mishchenko, "When, Why and How Much? Adaptive Learning Rate Scheduling by
Refinement", 2023 (arXiv 2310.07831). Symbols are the paper's: T steps, step sizes eta_t, weights w_t, gradient norms
G_t, D the distance from the start to the comparator. Against the authors' code: `optimise_bound` finds the minimiser
of their numeric bound in closed form, where they run a quasi-Newton method over all the step sizes.
"""

from workingpapers.training.refined_schedules.bounds import OptimalSteps as OptimalSteps
from workingpapers.training.refined_schedules.bounds import last_iterate_bound as last_iterate_bound
from workingpapers.training.refined_schedules.bounds import optimise_bound as optimise_bound
from workingpapers.training.refined_schedules.bounds import weights_from_schedule as weights_from_schedule
from workingpapers.training.refined_schedules.recorder import GradNormRecorder as GradNormRecorder
from workingpapers.training.refined_schedules.reduction import LastIterate as LastIterate
from workingpapers.training.refined_schedules.reduction import last_iterate_wrapper as last_iterate_wrapper
from workingpapers.training.refined_schedules.schedulers import LinearDecay as LinearDecay
from workingpapers.training.refined_schedules.schedulers import RefinedLR as RefinedLR
from workingpapers.training.refined_schedules.shapes import refine as refine
from workingpapers.training.refined_schedules.shapes import schedule_shape as schedule_shape
