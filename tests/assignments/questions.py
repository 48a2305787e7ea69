"""The questions: which functions students write, and which tests of the repository grade each.

A row names a function of the six files; nothing in those files knows of it. The function's
signature and docstring are the specification; `equation` and `hint` add what the docstring leaves
open. tests/test_assignments.py checks every row. With a blank in the place of the function each of
its tests fails, with the original all pass, and a planted mistake of tests/mutants.py is caught.
With -m zoo this is done for all planted mistakes, and for the wrong answers of tests/zoo.py.

To add a question:
1. Add a row below. Take a new number of an existing part, or add a part to PARTS.
2. Name tests that fail while the function is a blank, each by its id for pytest. Tests that other
   questions do not need belong in tests/test_questions.py: it says how they are written.
3. Plant at least two mistakes in the function (rows of tests/mutants.py), which these tests catch.
4. Put at least three right answers and four wrong ones into tests/zoo.py.
5. Write "(Q number)" behind the row of README's "The paper, line by line" that `row` names.
6. Run `python -m pytest tests/test_assignments.py`, then with `-m zoo`.
To change marks, change `marks`; over all rows they must add up to 100. To make a question's tests
stricter, name further tests in `tests`. Nothing else has to be changed.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """number: "part.question". target: "module.function" or "module.Class.method". marks: of 100.

    minutes: for a student who has read the file. needs: numbers of the questions that must be
    solved before its tests can pass in a starter, beside 1.1, which is recorded there. row: the
    first cell of its row in README's table "The paper, line by line". tests: ids for pytest,
    together at most a few seconds. unseen: further ids, which no starter has; they must ask for
    nothing that `tests` do not ask for, only with other numbers.
    """
    number: str
    target: str
    title: str
    marks: int
    minutes: int
    needs: tuple
    row: str
    equation: str
    hint: str
    tests: tuple
    unseen: tuple = ()


PARTS = {1: "The noise process", 2: "FiLM and its siblings", 3: "Heads", 4: "Kinematics",
         5: "The recipe"}

DIFFUSION = "tests/test_diffusion.py::"
FILM = "tests/test_film.py::"
KINEMATICS = "tests/test_kinematics.py::"
NET = "tests/test_net.py::"
POLICY = "tests/test_policy.py::"
PUSHT = "tests/test_sim_pusht.py::"
ASKED = "tests/test_questions.py::"
TRAIN = "tests/test_train.py::"

QUESTIONS = (
    Question(
        number="1.1", target="diffusion.DDPM.__init__", title="The schedule",
        marks=7, minutes=30, needs=(), row="adding noise",
        equation="""\
f(u) = cos²(π/2 · (u + 0.008) / 1.008), u = 0, 1/N, ..., 1, for N timesteps
beta_t = 1 - f((t+1)/N) / f(t/N), at most 0.999
alpha_t = 1 - beta_t, abar_t = alpha_0 · ... · alpha_t
q(x_{t-1} | x_t, x_0) = N(a_t x_0 + b_t x_t, s_t²), with abar_{-1} = 1 and
  a_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t)
  b_t = sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t)
  s_t² = beta_t (1 - abar_{t-1}) / (1 - abar_t)""",
        hint="The other methods expect `self.num_timesteps` and seven buffers: betas, "
             "alphas_cumprod (abar), signal_scale (root of abar), noise_scale (root of 1 - abar), "
             "posterior_clean (a), posterior_noisy (b) and posterior_std (s). Compute in float64 "
             "and round once; `register_buffer` has an option that keeps a buffer out of files.",
        tests=(ASKED + "test_a_schedule_is_its_equations",
               ASKED + "test_a_schedule_is_in_no_file_and_moves_with_its_module",
               DIFFUSION + "test_schedule_equals_diffusers",
               DIFFUSION + "test_alphas_cumprod_falls_inside_0_1[1]",
               DIFFUSION + "test_alphas_cumprod_falls_inside_0_1[1000]",
               ASKED + "test_a_schedule_of_no_timesteps_is_refused",
               NET + "test_the_schedule_s_scales_and_posterior_follow_from_its_betas")),
    Question(
        number="1.2", target="diffusion.DDPM.add_noise", title="Adding noise",
        marks=3, minutes=10, needs=(), row="adding noise",
        equation="x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps",
        hint="Question 1.1 made both roots. `at_timestep`, at the top of the file, picks those of "
             "each sample's timestep and gives them the axes that (B,T,A) needs.",
        tests=(ASKED + "test_each_sample_has_the_noise_of_its_own_timestep",
               ASKED + "test_noise_is_added_by_any_schedule",
               DIFFUSION + "test_add_noise_equals_diffusers",
               NET + "test_add_noise_takes_one_timestep_for_all_or_one_for_each")),
    Question(
        number="1.3", target="diffusion.DDPM.predict_clean", title="The clean actions",
        marks=3, minutes=10, needs=("1.2",), row="one step back, 100 of them",
        equation="x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, solved for x_0",
        hint="Clip the result, not what you divide.",
        tests=(ASKED + "test_clean_actions_by_any_schedule",
               DIFFUSION + "test_predict_clean_undoes_add_noise_and_clips",
               NET + "test_the_clean_actions_of_one_timestep_for_all_are_clipped")),
    Question(
        number="1.4", target="diffusion.DDPM.step", title="One step back",
        marks=5, minutes=15, needs=("1.3",), row="one step back, 100 of them",
        equation="x_{t-1} = a_t x_0 + b_t x_t + s_t z, with x_0 as predicted and z the given noise",
        hint="The last step, t = 0, must add no noise. Look at the values of question 1.1 there "
             "before you write an `if`. Timesteps may differ within a batch.",
        tests=(ASKED + "test_one_step_back_by_any_schedule",
               ASKED + "test_a_run_of_steps_equals_diffusers",
               ASKED + "test_each_sample_steps_back_from_its_own_timestep")),
    Question(
        number="1.5", target="diffusion.DDPM.ddim_step", title="A long step back",
        marks=5, minutes=15, needs=("1.2", "1.3"), row="v2 on LIBERO: DDIM, 10 steps",
        equation="""\
x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps for the previous timestep s < t, x_0 as predicted;
x_{-1} = x_0""",
        hint="eps is what the network predicted, even where x_0 was clipped and the two no longer "
             "fit x_t. Mind that -1 is a valid index in Python.",
        tests=(ASKED + "test_a_long_step_back_by_any_schedule",
               DIFFUSION + "test_ddim_trajectory_equals_diffusers"),
        unseen=(ASKED + "test_a_long_step_back_with_other_numbers",)),

    Question(
        number="2.1", target="film.FiLM.modulate", title="FiLM",
        marks=3, minutes=10, needs=(), row="Eq. 3 and 11, gamma h + beta",
        equation="h'_btd = gamma_bd h_btd + beta_bd; m_b holds gamma_b, then beta_b",
        hint="Read the docstring of `Mechanism`: the shapes of h and m, and the trap. It must work "
             "for the layout of the U-Net as well, (B,D,T). You may write into h, but not into "
             "m.",
        tests=(ASKED + "test_film_is_its_equation[steps_first]",
               ASKED + "test_film_is_its_equation[channels_first]",
               ASKED + "test_film_hands_on_gradients_and_leaves_its_modulation[steps_first]",
               ASKED + "test_film_hands_on_gradients_and_leaves_its_modulation[channels_first]")),
    Question(
        number="2.2", target="film.AdaLNZero.gate", title="The gate of AdaLN-Zero",
        marks=2, minutes=5, needs=(), row="v2 IV-E, seven mechanisms",
        equation="x' = x + alpha · branch; m_b holds gamma_b, beta_b, alpha_b",
        hint="`Mechanism` says what a gate is given and who adds the result to x. You may write "
             "into h, but not into m.",
        tests=(ASKED + "test_a_gate_is_its_equation[steps_first]",
               ASKED + "test_a_gate_is_its_equation[channels_first]",
               FILM + "test_the_gate_scales_the_branch_alone",
               FILM + "test_a_mechanism_is_its_equation[adaln-zero-channels_first]")),
    Question(
        number="2.3", target="heads.TimeEncoder.forward", title="The timestep encoder",
        marks=5, minutes=20, needs=(), row="Fig. 1, f_tau belongs to the head",
        equation="""\
w_i = 10000^(-i / (n-1)) for i = 0 ... n-1, n = dim / 2
tau = mlp([sin(k w_0) ... sin(k w_{n-1}), cos(k w_0) ... cos(k w_{n-1})]) for timestep k""",
        hint="`self.mlp` does nothing where learned=False. Make new tensors on the timestep's "
             "device.",
        tests=(ASKED + "test_a_sinusoid_of_any_size_and_any_timestep",
               ASKED + "test_the_layers_on_the_sinusoid_learn")),
    Question(
        number="2.4", target="film.Conditioning.forward", title="The generators",
        marks=7, minutes=25, needs=(), row="Eq. 2, condition c = [o, tau]",
        equation="(m_1, ..., m_R) = W mish([o, tau]) + b = W_o mish(o) + b + W_tau mish(tau)",
        hint="W_o with b is `self.observation_part`, W_tau is `self.time_part`; both put out all R "
             "layers in a row. Layer r has `self.sizes[r]` numbers: all of the first vector, then "
             "all of the second. K is the length of tau divided by that of o. The first K rows of "
             "tau belong to the first observation, the next K to the second. Return a list.",
        tests=(ASKED + "test_generators_of_any_sizes",
               FILM + "test_two_halves_equal_one_product_on_the_concatenation",
               FILM + "test_one_modulation_per_layer_and_noise_draws_follow_their_observation"
                      "[film]",
               FILM + "test_one_modulation_per_layer_and_noise_draws_follow_their_observation"
                      "[adaln-zero]",
               FILM + "test_every_noise_draw_has_its_own_timestep")),

    Question(
        number="3.1", target="heads.MLPBlock.forward", title="A block of DP-MLP",
        marks=5, minutes=20, needs=(), row="IV-D, DP-MLP, 4M",
        equation="x' = after_norm(LN(x + gate(W2 modulate(gelu(W1 x + b1)) + b2)))",
        hint="`self.mechanism` has the three methods; each takes features and the modulation. "
             "gelu is the exact one: `F.gelu` without further arguments. `self.dropout` acts on the "
             "wide layer before it is modulated, and on the branch before the gate. `self.norm` "
             "comes last: post-norm.",
        tests=(ASKED + "test_a_block_is_its_equation",
               ASKED + "test_a_block_drops_its_wide_layer_and_its_branch",
               NET + "test_an_mlp_block_gives_the_recorded_numbers",
               NET + "test_an_mlp_block_drops_features_in_its_hidden_layer_and_in_its_branch")),
    Question(
        number="3.2", target="heads.causal_mask", title="The causal mask",
        marks=3, minutes=10, needs=(), row="DP-T, cross-attention",
        equation="mask_ij = (j <= i) or (i < in_front and j < in_front)",
        hint="bool, on the given device; no loop is needed.",
        tests=(ASKED + "test_a_mask_of_any_size",
               *(NET + f"test_which_steps_a_step_may_look_at[{case}]" for case in
                 ("0-expected0", "1-expected1", "2-expected2", "3-expected3")))),
    Question(
        number="3.3", target="heads.Attention.forward", title="Attention",
        marks=6, minutes=30, needs=(), row="V-B, why cross-attention collapses",
        equation="""\
for each head, of width d = D / heads: softmax(q k^T / sqrt(d)) v, the softmax's weight 0 where mask is False;
then the heads side by side, and one matrix""",
        hint="`self.key_value` puts out keys and values, in this order; head 1 has the first d "
             "features of each. `F.scaled_dot_product_attention` wants heads before steps, takes a "
             "bool mask as it is here, and does not know whether the module is in train mode. Only "
             "there dropout of rate `self.dropout` acts, on the softmax's weights.",
        tests=(ASKED + "test_attention_is_its_equation",
               ASKED + "test_attention_drops_its_weights",
               NET + "test_attention_is_that_of_torch",)),

    Question(
        number="4.1", target="kinematics.PlanarArm.joints", title="Forward kinematics",
        marks=5, minutes=20, needs=(), row="Eq. 5-7, forward kinematics",
        equation="p_0 = base, p_n = p_{n-1} + L_n (cos θ_n, sin θ_n), θ_n = q_1 + ... + q_n",
        hint="`unit` makes the vectors. Any number of leading dimensions, also none; dtype and "
             "device are those of the angles. (Make the lengths in this dtype at "
             "once: a float32 number is not exact in float64.)",
        tests=(ASKED + "test_joints_need_an_angle_for_each_link",
               ASKED + "test_joints_of_any_arm_in_any_shape",
               KINEMATICS + "test_links_keep_their_lengths",
               NET + "test_the_joints_of_many_poses_are_those_of_each",
               KINEMATICS + "test_forward_at_known_poses[angles2-expected2]",
               KINEMATICS + "test_forward_at_known_poses[angles3-expected3]")),
    Question(
        number="4.2", target="kinematics.PlanarArm.jacobian", title="The Jacobian",
        marks=5, minutes=20, needs=("4.1",), row="Eq. 5-7, forward kinematics",
        equation="∂p_N / ∂q_n = R(90°) (p_N - p_{n-1}): joint n sits at p_{n-1}",
        hint="A quarter turn from the x axis towards the y axis, whatever way y points on a "
             "screen. x and y come before the joints: (...,2,N).",
        tests=(ASKED + "test_a_jacobian_is_its_equation",
               KINEMATICS + "test_forward_and_jacobian_for_any_number_of_links[lengths0-base0]",
               KINEMATICS + "test_forward_and_jacobian_for_any_number_of_links[lengths2-base2]",
               KINEMATICS + "test_forward_takes_a_single_pose_and_keeps_dtype")),
    Question(
        number="4.3", target="kinematics.PlanarArm.joint_step", title="Damped inverse velocity",
        marks=5, minutes=20, needs=("4.1", "4.2"), row="IV-A, observation-free data",
        equation="Δq = J^T (J J^T + λ² I)^-1 Δp, λ = DAMPING",
        hint="J J^T is 2 x 2 for any number of joints. Solve, do not invert. Keep the angles' "
             "dtype and device.",
        tests=(ASKED + "test_a_joint_step_keeps_the_dtype_of_its_angles",
               ASKED + "test_a_joint_step_of_any_arm",
               KINEMATICS + "test_joint_step_is_the_smallest_motion_that_moves_the_hand"
                            "[lengths0-base0]",
               KINEMATICS + "test_joint_step_is_the_smallest_motion_that_moves_the_hand"
                            "[lengths1-base1]",
               KINEMATICS + "test_motion_is_smooth[lengths1]",
               ASKED + "test_a_joint_step_is_the_damped_inverse")),

    Question(
        number="5.1", target="train.freeze", title="Freezing",
        marks=2, minutes=5, needs=(), row="Eq. 10, stage 2: new Phi and F, frozen G and f_tau",
        equation="stage 2 minimises over Phi and F; G and f_tau are constants",
        hint="The backbone holds G and f_tau, and nothing else. Its weights keep their values, and "
             "gradients still go through it, to what it is given. Its mode, train or eval, is not "
             "your concern.",
        tests=(ASKED + "test_freezing_stops_every_weight_and_no_gradient",
               NET + "test_freezing_stops_at_the_module_s_edge[mlp]",
               NET + "test_freezing_stops_at_the_module_s_edge[transformer]")),
    Question(
        number="5.2", target="train.windows", title="Windows that stay in their episode",
        marks=6, minutes=25, needs=(), row="predict 16, execute 8",
        equation="""\
w_fj = min(max(f + first + j, s), e) for frame f and j = 0 ... length-1,
s and e the first and last frame of the episode that f is in""",
        hint="`episode_ends` holds for each episode the index after its last frame. The last one "
             "is the number of frames that count; the file may hold more. No loop over frames: "
             "`torch.searchsorted` finds each frame's episode. The result is on `device`.",
        tests=(ASKED + "test_windows_of_any_length_from_any_first_frame",
               ASKED + "test_windows_are_on_the_device",
               TRAIN + "test_windows_stay_in_their_episode_and_start_one_step_before_the_present",
               NET + "test_num_demos_takes_the_first_episodes_of_a_file")),
    Question(
        number="5.3", target="train.ema_update", title="The moving average",
        marks=5, minutes=15, needs=(), row="EMA, power 0.75",
        equation="""\
avg <- d avg + (1 - d) w, in place, for each pair of tensors; d = ema_decay in update n - 1,
where n = num_averaged""",
        hint="`averages` and `weights` are lists of tensors; num_averaged, an int or a tensor with "
             "one number, counts the weights that are in the average by now. Nothing is returned. "
             "Nothing but the averages is changed, and they hold no graph.",
        tests=(ASKED + "test_the_average_of_all_tensors",
               NET + "test_the_average_by_hand",)),
    Question(
        number="5.4", target="diffusion.DiffusionPolicy.loss", title="The loss",
        marks=7, minutes=30, needs=("1.2",), row="loss, the squared error of the noise",
        equation="E |eps - eps_hat(x_k, k, o)|², k uniform on all timesteps, eps standard normal",
        hint="Normalise the actions and repeat each row K = `self.noise_samples` times, copies "
             "next to each other. Each has its own k and eps. `choose_steps` then takes a part of "
             "the horizon of both; give `predict_noise` the steps that it returns. Encode the "
             "observations once, not K times: `encoder.perceive`, then `encode`. Last, add "
             "the encoder's `auxiliary_loss`. It is 0 here; from pixels it is a second term. Draw "
             "on the actions' device. `self.ddpm.num_timesteps` says how many timesteps there are.",
        tests=(ASKED + "test_the_loss_and_its_gradients",
               ASKED + "test_the_loss_draws_every_timestep_there_is",
               ASKED + "test_the_loss_draws_on_the_policy_s_device",
               NET + "test_a_network_that_solves_for_the_noise_has_no_loss[plain]",
               NET + "test_a_network_that_solves_for_the_noise_has_no_loss[both]",
               NET + "test_the_present_position_can_be_given",
               NET + "test_the_loss_encodes_an_observation_once_for_all_its_draws",
               NET + "test_the_loss_of_a_silent_network_is_one",
               NET + "test_what_the_encoder_adds_to_the_loss_is_added",
               NET + "test_every_noise_draw_has_its_own_timestep_and_all_timesteps_are_trained",
               NET + "test_every_number_has_its_own_noise")),
    Question(
        number="5.5", target="diffusion.DiffusionPolicy.act", title="Receding horizon",
        marks=4, minutes=20, needs=("1.2", "1.3", "1.5"), row="predict 16, execute 8",
        equation="of a chunk a_{-1}, a_0, ..., a_14: a_0 ... a_{Ta-1} are executed",
        hint="`self.sample` draws a normalised chunk, `denormalise` needs the agent's present "
             "position, `first_executed` says where a_0 is. `self.conditioning.encoder` has that "
             "position, and `read`, which checks observations and moves them to the policy's "
             "device. Keep the targets on the board, from `self.low` to `self.high`. If any number "
             "that is executed is NaN, raise FloatingPointError. The result holds no graph.",
        tests=(ASKED + "test_acting_by_other_settings",
               ASKED + "test_acting_refuses_actions_that_are_no_numbers",
               ASKED + "test_acting_takes_arrays_and_refuses_what_is_no_number",
               NET + "test_the_first_executed_action_is_that_of_the_present[1-10]",
               NET + "test_the_first_executed_action_is_that_of_the_present[15-10]")),
    Question(
        number="5.6", target="sim_pusht.block_coverage", title="Coverage by Green's theorem",
        marks=7, minutes=60, needs=(), row="best of 50 checkpoints in 50 scenes",
        equation="""\
area(P ∩ box) = |∮ h(y) dx| around P, over the part with left <= x <= right,
h(y) = min(max(y, top), bottom) - top; coverage = sum over the 2 x 2 pairs of boxes / BLOCK_AREA""",
        hint="Complex numbers: POINTS are the corners of the block's two boxes (4 each), EDGES the "
             "vectors to the next corner, LOW and HIGH the corners of the goal's two boxes, from "
             "the centre of mass, CENTER. `crossing` gives the two times at which an edge meets "
             "two levels; clip them to where the edge is. Any exact method counts.",
        tests=(ASKED + "test_coverage_of_another_goal",
               PUSHT + "test_coverage_equals_the_recorded",
               PUSHT + "test_coverage_equals_counted_points",
               PUSHT + "test_coverage_of_known_poses")),
)
