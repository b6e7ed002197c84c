//! Which process keeps which tensors, where each keeps a share (ZeRO's first stage: Rajbhandari et al. 2020, by whole tensors).

use std::sync::Arc;

use tch::Tensor;

use super::World;
use crate::error::Result;

/// Owners of a parameter set's tensors among the processes of a world.
#[derive(Debug, Clone)]
pub struct Owners {
    ranks: Arc<[usize]>,
    rank: usize,
}

impl Owners {
    /// Of these tensors; the same on every process.
    pub fn new(world: &World, tensors: &[Tensor]) -> Self {
        let sizes: Vec<usize> = tensors.iter().map(Tensor::numel).collect();
        Self { ranks: owners(&sizes, world.size()).into(), rank: world.rank() }
    }

    /// Rank that keeps tensor `i`.
    pub fn of(&self, i: usize) -> usize {
        self.ranks[i]
    }
    /// Ranks of all tensors.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }
    /// Whether this process keeps tensor `i`.
    pub fn is_mine(&self, i: usize) -> bool {
        self.ranks[i] == self.rank
    }

    /// What this process keeps of a list with an entry for each tensor.
    pub fn mine<'a>(&self, list: &'a [Tensor]) -> Vec<&'a Tensor> {
        list.iter().enumerate().filter(|(i, _)| self.is_mine(*i)).map(|(_, t)| t).collect()
    }

    /// Lets go of the elements of all tensors that another process keeps. They keep their sizes, and must not be read.
    pub fn let_go(&self, list: &[Tensor]) -> Result<()> {
        tch::no_grad(|| {
            for (_, t) in list.iter().enumerate().filter(|(i, _)| !self.is_mine(*i)) {
                let hollow = Tensor::f_zeros([1i64; 0], (t.kind(), t.device()))?.f_expand(t.size(), false)?;
                t.shallow_clone().f_set_data(&hollow)?;
            }
            Ok(())
        })
    }
}

/// A tensor as a checkpoint names it, and the rank that has its elements where not every process has them.
#[derive(Debug)]
pub struct Named {
    /// Its name in the checkpoint.
    pub name: String,
    /// It, or on processes that do not keep it something of its size and kind.
    pub tensor: Tensor,
    /// Who keeps it; none: every process does.
    pub owner: Option<usize>,
}

impl Named {
    /// A tensor that every process has.
    pub fn new(name: impl Into<String>, tensor: &Tensor) -> Self {
        Self { name: name.into(), tensor: tensor.shallow_clone(), owner: None }
    }

    /// Tensor `i` of those that `owners` share out; none: every process has it.
    pub fn owned(name: impl Into<String>, tensor: &Tensor, owners: Option<&Owners>, i: usize) -> Self {
        Self { owner: owners.map(|o| o.of(i)), ..Self::new(name, tensor) }
    }
}

/// Owners of whole tensors of these sizes among `world` processes: the largest first, each to the one that has least.
pub fn owners(sizes: &[usize], world: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sizes[i]));
    let (mut owners, mut has) = (vec![0; sizes.len()], vec![0usize; world.max(1)]);
    for i in order {
        let least = (0..has.len()).min_by_key(|&rank| has[rank]).unwrap_or(0);
        owners[i] = least;
        has[least] += sizes[i];
    }
    owners
}

/// Elements that the process with most of them owns.
pub fn largest_share(sizes: &[usize], world: usize) -> usize {
    let owners = owners(sizes, world);
    let share = |rank: usize| sizes.iter().zip(&owners).filter(|(_, owner)| **owner == rank).map(|(n, _)| n).sum();
    (0..world.max(1)).map(share).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_owned_evenly_by_size() {
        assert_eq!(owners(&[5, 9, 4, 1, 3], 2), [1, 0, 1, 1, 0]);
        assert_eq!(largest_share(&[5, 9, 4, 1, 3], 2), 12);
        assert_eq!(owners(&[2, 2, 2], 1), [0, 0, 0]);
        assert_eq!(owners(&[7], 3), [0]);
        assert_eq!((largest_share(&[7], 3), largest_share(&[], 3)), (7, 0));
    }

    #[test]
    fn what_others_keep_takes_no_memory_here() {
        let list = [Tensor::from_slice(&[1f32, 2.0]), Tensor::ones([300, 200], (tch::Kind::Float, tch::Device::Cpu))];
        let owners = Owners { ranks: [0, 1].into(), rank: 0 };
        let alias = list[1].shallow_clone();
        owners.let_go(&list).unwrap();
        assert_eq!((list[1].size(), list[1].stride()), (vec![300, 200], vec![0, 0]));
        assert_eq!(alias.stride(), [0, 0], "every handle lets go");
        assert_eq!(Vec::<f32>::try_from(&list[0]).unwrap(), [1.0, 2.0]);
        assert_eq!(owners.mine(&list).len(), 1);
    }
}
