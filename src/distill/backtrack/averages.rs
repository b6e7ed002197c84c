//! Averages of the student's weights, whole or shared out among the processes.

use tch::Tensor;

use super::networks::average_prefix;
use crate::distill::checkpoint::{Checkpoint, named};
use crate::distill::config::Config;
use crate::distill::student::Student;
use crate::error::Result;
use crate::torch::ParamSet;
use crate::torch::dist::{Named, Owners, World};
use crate::torch::train::ema;

/// Averaged weights of the student (f32).
pub(super) struct Average {
    pub half_life: f64,
    pub student: Student,
}

/// The first is what a run ends with.
pub(super) struct Averages {
    all: Vec<Average>,
    /// Who keeps which weights, where each process keeps a share.
    owners: Option<Owners>,
}

impl Averages {
    /// As many as configured, each beginning as `student`.
    pub fn new(config: &Config, student: &Student) -> Result<Self> {
        let half_lives = std::iter::once(&config.ema.half_life).chain(&config.ema.more);
        let all = half_lives.map(|&half_life| Ok(Average { half_life, student: student.copy()? }));
        Ok(Self { all: all.collect::<Result<_>>()?, owners: None })
    }

    /// Each process keeps what it owns from now on.
    pub fn share(&mut self, owners: &Owners) -> Result<()> {
        self.owners = Some(owners.clone());
        self.let_go()
    }

    /// Whether each process keeps a share.
    pub fn are_shared(&self) -> bool {
        self.owners.is_some()
    }

    /// The student with the weights that the run ends with, see [`Averages::gather`].
    pub fn first(&self) -> &Student {
        &self.all[0].student
    }

    /// The others, each with its half-life in images.
    pub fn others(&self) -> Vec<(f64, &Student)> {
        self.all.iter().skip(1).map(|a| (a.half_life, &a.student)).collect()
    }

    /// Moves all towards the student's present weights, after an update of `images` images; `updates` counts it.
    pub fn update(&self, live: &ParamSet, config: &Config, updates: u64) -> Result<()> {
        let images = config.images();
        for average in &self.all {
            let decay = ema::decay(images, updates * images, average.half_life, config.ema.ramp);
            tch::no_grad(|| ema::update(average.student.params(), live, decay, self.owners.as_ref()))?;
        }
        Ok(())
    }

    /// Rank 0 gets the weights that others keep, until [`Averages::let_go`]: in the memory order of `like`, the student's own.
    pub fn gather(&self, world: &World, like: &ParamSet) -> Result<()> {
        let Some(owners) = &self.owners else { return Ok(()) };
        for average in &self.all {
            for (k, (mine, like)) in average.student.params().tensors().iter().zip(like.tensors()).enumerate() {
                let theirs = world.to_leader(owners.of(k), mine)?;
                if let Some(theirs) = theirs.filter(|_| !owners.is_mine(k)) {
                    put(mine, like, Some(&theirs))?;
                }
            }
        }
        Ok(())
    }

    /// What other processes keep is not held here any longer.
    pub fn let_go(&self) -> Result<()> {
        let Some(owners) = &self.owners else { return Ok(()) };
        self.all.iter().try_for_each(|average| owners.let_go(average.student.params().tensors()))
    }

    /// All weights of all averages, on every process.
    pub fn into_whole(self, world: &World, like: &ParamSet) -> Result<Vec<Average>> {
        self.gather(world, like)?;
        if self.owners.is_some() {
            for average in &self.all {
                let own = average.student.params();
                for (mine, like) in own.tensors().iter().zip(like.tensors()) {
                    if mine.stride() != like.stride() {
                        put(mine, like, None)?;
                    }
                    world.broadcast(std::slice::from_ref(mine))?;
                }
            }
        }
        Ok(self.all)
    }

    /// What a checkpoint has of them.
    pub fn tensors(&self) -> Vec<Named> {
        let of = |(k, a): (usize, &Average)| named(&average_prefix(k), a.student.params(), self.owners.as_ref());
        self.all.iter().enumerate().flat_map(of).collect()
    }

    /// Takes back what [`Averages::tensors`] gave.
    pub fn restore(&self, checkpoint: &mut Checkpoint) -> Result<()> {
        let mut all = self.all.iter().enumerate();
        all.try_for_each(|(k, a)| checkpoint.take_params(&average_prefix(k), a.student.params(), self.owners.as_ref()))
    }
}

/// Memory of its own for a tensor that had none, in the order of `like`, with these values or any.
fn put(mine: &Tensor, like: &Tensor, values: Option<&Tensor>) -> Result<()> {
    tch::no_grad(|| {
        let mut there = like.detach().f_empty_like()?;
        if let Some(values) = values {
            there.f_copy_(values)?;
        }
        Ok(mine.shallow_clone().f_set_data(&there)?)
    })
}
