//! Values that make no sense, refused before the first step.

use super::{Config, DegradeConfig, Distribution, FakeDistribution, HeadKind, Init, LoraConfig, NodeCount};
use crate::distill::objective::Objective;
use crate::error::{Error, Result};

/// A student's steps are unrolled in one graph, and trained one after the other.
const MOST_STEPS: usize = 64;

impl Config {
    pub(super) fn validate(&self) -> Result<()> {
        let objective = self.built_objective()?;
        self.validate_values()?;
        self.check_objective(&*objective)
    }

    /// What can be checked without the objective.
    pub(super) fn validate_values(&self) -> Result<()> {
        self.check_counts()?;
        self.check_rates()?;
        self.check_levels()?;
        self.check_students()?;
        self.settings.check()?;
        self.check_additions()?;
        let settings = &self.degrade;
        if settings.nodes.is_auto() && (settings.spacing != DegradeConfig::default().spacing || settings.patience > 0) {
            return Err(Error::usage(
                "degrade.nodes is `auto`, which says where the nodes lie and when stage 1 ends: degrade.spacing and degrade.patience are not read",
            )
            .hint("leave them out, or give a number of nodes"));
        }
        if self.degrade.nodes.most() as u64 > self.degrade.steps {
            let few = match self.degrade.nodes {
                NodeCount::Auto => {
                    format!("degrade.nodes is `auto`, which may keep {} nodes", NodeCount::AUTO_MOST)
                }
                NodeCount::Count(_) => format!("degrade.nodes is {}", self.degrade.nodes),
            };
            return Err(Error::usage(format!(
                "{few}, but degrade.steps is {}: each node is recorded after a step of its own",
                self.degrade.steps
            ))
            .hint("raise degrade.steps (--degrade-steps), or take fewer nodes (--nodes)"));
        }
        Ok(())
    }

    /// Whole numbers within their bounds.
    fn check_counts(&self) -> Result<()> {
        let at_least_one = [
            ("batch", self.batch as u64),
            ("accumulate", self.accumulate as u64),
            ("backtrack.updates", self.backtrack.updates),
            ("backtrack.ratio", self.backtrack.ratio),
            ("backtrack.switch_every", self.backtrack.switch_every),
            ("backtrack.switch_patience", self.backtrack.switch_patience),
            ("backtrack.switch_max", self.backtrack.switch_max),
            ("optimizer.max_skips", self.optimizer.max_skips),
            ("log.every", self.log.every),
            ("log.sample_steps", self.log.sample_steps as u64),
            ("evaluate.every", self.evaluate.every),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, v)| *v == 0) {
            return Err(Error::usage(format!("{key} is 0, expected 1 or more")));
        }
        let limited = [("batch", self.batch), ("accumulate", self.accumulate), ("log.samples", self.log.samples)];
        if let Some((key, v)) = limited.iter().find(|(_, v)| *v > 1_000_000) {
            return Err(Error::usage(format!("{key} is {v}, expected 1000000 or less")));
        }
        if !(2..=1000).contains(&self.log.keep) {
            return Err(Error::usage(format!("log.keep is {}, expected 2 to 1000 checkpoints", self.log.keep)));
        }
        if self.memory.activations_mib > 1 << 30 {
            return Err(Error::usage(format!(
                "memory.activations_mib is {}: no device has that",
                self.memory.activations_mib
            )));
        }
        if !(2..=1_000_000).contains(&self.evaluate.images) {
            return Err(Error::usage(format!("evaluate.images is {}, expected 2 to 1000000", self.evaluate.images)));
        }
        if self.evaluate.reference.is_empty() && (!self.evaluate.features.is_empty() || self.evaluate.patience > 0) {
            return Err(Error::usage("evaluate.features and evaluate.patience need evaluate.reference"));
        }
        Ok(())
    }

    /// Rates and weights within their bounds.
    fn check_rates(&self) -> Result<()> {
        let rates = [
            ("backtrack.lr_generator", self.backtrack.lr_generator),
            ("optimizer.eps", self.optimizer.eps),
            ("noise.log_std", self.noise.log_std),
            ("gan.lr", self.gan.lr),
        ];
        if let Some((key, v)) = rates.iter().find(|(_, v)| !(v.is_finite() && *v > 0.0)) {
            return Err(Error::usage(format!("{key} is {v}, expected a number above 0")));
        }
        let not_negative = [
            ("degrade.lr", self.degrade.lr),
            ("backtrack.lr_fake", self.backtrack.lr_fake),
            ("student.sigma_init", self.student.sigma_init),
            ("guidance", self.guidance),
            ("optimizer.weight_decay", self.optimizer.weight_decay),
            ("optimizer.clip", self.optimizer.clip),
            ("ema.half_life", self.ema.half_life),
            ("ema.ramp", self.ema.ramp),
            ("lora.alpha", self.lora.alpha),
            ("gan.weight_generator", self.gan.weight_generator),
            ("gan.weight_discriminator", self.gan.weight_discriminator),
        ];
        if let Some((key, v)) = not_negative.iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return Err(Error::usage(format!("{key} is {v}, expected 0 or more")));
        }
        if !(self.divergence_factor > 1.0 && self.divergence_factor.is_finite()) {
            return Err(Error::usage(format!(
                "divergence_factor is {}, expected a number above 1",
                self.divergence_factor
            )));
        }
        if !(0.0..1.0).contains(&self.collapse_spread) {
            return Err(Error::usage(format!("collapse_spread is {}, expected 0 <= value < 1", self.collapse_spread)));
        }
        for (key, v) in [("optimizer.beta1", self.optimizer.beta1), ("optimizer.beta2", self.optimizer.beta2)] {
            if !(0.0..1.0).contains(&v) {
                return Err(Error::usage(format!("{key} is {v}, expected 0 <= value < 1")));
            }
        }
        for (key, betas) in [
            ("degrade.betas", &self.degrade.betas),
            ("backtrack.betas_generator", &self.backtrack.betas_generator),
            ("backtrack.betas_fake", &self.backtrack.betas_fake),
        ] {
            if !(betas.is_empty() || betas.len() == 2 && betas.iter().all(|b| (0.0..1.0).contains(b))) {
                return Err(Error::usage(format!(
                    "{key} is {betas:?}, expected [beta1, beta2] of 0 or more and below 1, or [] for the optimiser's"
                )));
            }
        }
        if let Some(v) = self.ema.more.iter().find(|v| !(v.is_finite() && **v >= 0.0)) {
            return Err(Error::usage(format!("ema.more holds {v}, expected half-lives of 0 or more images")));
        }
        Ok(())
    }

    /// Cool-down, guidance and noise levels.
    fn check_levels(&self) -> Result<()> {
        if self.backtrack.cooldown_fake > 1.0 || self.backtrack.cooldown_fake.is_nan() {
            return Err(Error::usage(format!(
                "backtrack.cooldown_fake is {}, expected 0 to 1, or below 0 for backtrack.cooldown",
                self.backtrack.cooldown_fake
            )));
        }
        if !(0.0..=1.0).contains(&self.backtrack.cooldown) {
            return Err(Error::usage(format!("backtrack.cooldown is {}, expected 0 to 1", self.backtrack.cooldown)));
        }
        self.target_guidance()?;
        let said = [
            ("guidance_interval", self.guidance_interval != Self::default().guidance_interval),
            ("guidance_by", !self.guidance_by.is_empty()),
            ("guidance_rescale", self.guidance_rescale != 0.0),
        ];
        if let Some((key, _)) = said.iter().find(|(_, given)| self.guidance == 1.0 && *given) {
            return Err(Error::usage(format!("{key} is given, but guidance is 1: nothing is guided"))
                .hint(format!("set guidance, or leave {key} out")));
        }
        for (key, shift) in [
            ("noise.shift", self.noise.shift),
            ("student.shift", self.student.shift),
            ("log.sample_shift", self.log.sample_shift),
        ] {
            if !(shift == 0.0 || (0.01..=100.0).contains(&shift)) {
                return Err(Error::usage(format!("{key} is {shift}, expected 0.01 to 100, or 0 for the card's")));
            }
        }
        let noise = &self.noise;
        let tabled = noise.distribution == Distribution::Table
            || noise.fake_distribution == FakeDistribution::Table
            || !self.gan.data.is_empty();
        if noise.shift != 0.0 && !tabled {
            return Err(Error::usage("noise.shift shifts the table of noise levels, from which nothing is drawn: noise.distribution is lognormal")
                .hint("of a flow the shift multiplies sigma: add its logarithm to noise.log_mean"));
        }
        if !self.noise.log_mean.is_finite() {
            return Err(Error::usage(format!("noise.log_mean is {}, expected a number", self.noise.log_mean)));
        }
        if !(2..=1_000_000).contains(&self.noise.levels) {
            return Err(Error::usage(format!("noise.levels is {}, expected 2 to 1000000", self.noise.levels)));
        }
        let gan_levels = if self.gan.data.is_empty() { [0, 0] } else { self.gan.levels };
        for (key, [low, high]) in
            [("noise.generator", self.noise.generator), ("noise.fake", self.noise.fake), ("gan.levels", gan_levels)]
        {
            if low > high || high >= self.noise.levels {
                return Err(Error::usage(format!(
                    "{key} is [{low}, {high}], expected first <= last <= {} (noise.levels - 1)",
                    self.noise.levels - 1
                )));
            }
        }
        Ok(())
    }

    /// The student and recorded steps.
    fn check_students(&self) -> Result<()> {
        let student = &self.student;
        let named = !(student.noise.is_empty() && student.output.is_empty() && student.conditions.is_empty());
        if named && student.file.is_empty() {
            return Err(Error::usage(
                "student.noise, .output and .conditions name ports of student.file, which is empty",
            ));
        }
        if let Some(pair) = student.conditions.iter().find(|p| !p.contains('=')) {
            return Err(Error::usage(format!("student.conditions holds `{pair}`, expected condition=input")));
        }
        if student.init == Init::Random && self.lora.rank > 0 && student.file.is_empty() {
            return Err(Error::usage("student.init is `random`, but lora.rank keeps the student's own weights frozen")
                .hint("leave one of the two out, or give a network of its own as student.file"));
        }
        if student.steps > 0 && !student.sigmas.is_empty() {
            return Err(Error::usage(
                "student.steps and student.sigmas both say at which noise levels the student is evaluated",
            )
            .hint("student.steps makes a grid, student.sigmas lists levels: leave one of the two out"));
        }
        if student.steps == 0 && student.shift != 0.0 {
            return Err(Error::usage("student.shift shifts the grid of student.steps, which is 0")
                .hint("student.steps = 4 with student.shift = 3.0 is a grid; leave student.shift out otherwise"));
        }
        if student.sigmas.len() >= MOST_STEPS {
            return Err(Error::usage(format!(
                "student.sigmas has {} levels, expected less than {MOST_STEPS}: each is a step of the student's graph",
                student.sigmas.len()
            )));
        }
        if student.steps > MOST_STEPS {
            return Err(Error::usage(format!("student.steps is {}, expected {MOST_STEPS} or less", student.steps))
                .hint("a student of few steps has 2 to 8: all of them stand in one graph, and each is trained"));
        }
        let unrecorded = [
            ("accumulate is more than 1", self.accumulate > 1),
            (
                "student.sigmas or .steps gives the student further steps, of which one is drawn each time",
                student.further_steps() > 0,
            ),
            ("gan.data brings real samples into every step", !self.gan.data.is_empty()),
        ];
        if let Some((why, _)) = unrecorded.iter().find(|(_, is)| self.cuda_graphs && *is) {
            return Err(Error::usage(format!("cuda_graphs records a step that is the same each time, but {why}"))
                .hint("leave one of the two out"));
        }
        Ok(())
    }

    /// What goes with this objective.
    fn check_objective(&self, objective: &dyn Objective) -> Result<()> {
        let name = objective.name();
        if !objective.needs_fake() && self.backtrack.ratio != 1 {
            return Err(Error::usage(format!(
                "backtrack.ratio is {}, but the objective `{name}` has no fake score to be stepped: expected 1",
                self.backtrack.ratio
            )));
        }
        if objective.needs_discriminator() && self.gan.data.is_empty() {
            return Err(Error::usage(
                "this objective has a discriminator, which needs real samples: gan.data is empty",
            )
            .hint(
                "gan.data is a folder, .zip, .npz or latents; without data there are `dmd`, `sid` and others, and `uni-instruct` with \
                 uni_instruct.divergence=reverse-kl",
            ));
        }
        if !objective.needs_fake() && !self.gan.data.is_empty() {
            return Err(Error::usage(format!(
                "gan.data is given, but the objective `{name}` has no fake score to tap"
            ))
            .hint("the discriminator goes with every objective that has a fake score"));
        }
        if self.gan.shared_pass && !objective.through_scores() {
            return Err(Error::usage(format!(
                "gan.shared_pass is true, but the objective `{name}` does not differentiate the fake score, so that no gradient of \
                 the discriminator comes through its pass"
            ))
            .hint("gan.shared_pass goes with `sid`, `sim` and `uni-instruct`"));
        }
        Ok(())
    }

    /// The discriminator and low-rank adaptation: settings that say nothing without each other.
    fn check_additions(&self) -> Result<()> {
        let additions = [("head", self.gan.head != HeadKind::Layers), ("shared_pass", self.gan.shared_pass)];
        if let Some((key, _)) = additions.into_iter().find(|(_, set)| *set && self.gan.data.is_empty()) {
            return Err(Error::usage(format!("gan.{key} is given, but gan.data is empty: there is no discriminator"))
                .hint("gan.data is a folder, .zip, .npz or latents of real samples"));
        }
        if !self.gan.taps.is_empty() && self.gan.data.is_empty() {
            return Err(Error::usage(
                "gan.taps is given, but gan.data is empty: there is no discriminator to read them",
            )
            .hint("gan.data is a folder, .zip, .npz or latents of real samples; leave gan.taps out otherwise"));
        }
        crate::distill::gan::taps::check(&self.gan.taps)?;
        if self.lora.rank == 0 && (self.lora.alpha > 0.0 || self.lora.include != LoraConfig::default().include) {
            return Err(Error::usage(
                "lora.alpha or lora.include is given, but lora.rank is 0: all weights are trained",
            )
            .hint("set lora.rank, 4 to 64 are usual, or leave them out"));
        }
        Ok(())
    }
}
