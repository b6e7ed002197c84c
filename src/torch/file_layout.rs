//! How a tensor lies in our files, where the graph holds it otherwise. Exporters transpose and reshape weights (a `Linear` that
//! becomes a MatMul holds its weight transposed); a framework that reads a file under its own names expects its own layout, and
//! accepts a square matrix the wrong way round without a word.

use std::collections::HashMap;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::graph::roles::StoredLayout;

/// `graph tensor = file tensor, its axes permuted, reshaped`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLayout {
    /// Shape in the file, which is the framework's.
    shape: Vec<i64>,
    perm: Vec<i64>,
}

/// By the parameter's name; what is not here lies in files as in the graph.
pub type FileLayouts = HashMap<String, FileLayout>;

impl FileLayout {
    /// The layout that a converter recorded for a tensor of this shape in the graph.
    ///
    /// Errors: axes that are no permutation; shapes of other numbers of elements.
    pub fn new(name: &str, stored: &StoredLayout, in_graph: &[usize]) -> Result<Self> {
        let StoredLayout { shape, perm } = stored;
        let mut axes = perm.clone();
        axes.sort_unstable();
        let fits = axes.iter().copied().eq(0..shape.len())
            && shape.iter().product::<usize>() == in_graph.iter().product::<usize>();
        if !fits {
            return Err(Error::invalid(format!(
                "metadata disback.parameters.layout of `{name}`: shape {shape:?} with axes {perm:?} is no layout of a tensor of \
                 shape {in_graph:?}"
            ))
            .hint("convert the network again"));
        }
        let wide = |v: &[usize]| v.iter().map(|&n| n as i64).collect();
        Ok(Self { shape: wide(shape), perm: wide(perm) })
    }

    /// Shape in the file.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// A tensor of the graph as it lies in the file.
    pub fn for_file(&self, t: &Tensor) -> Result<Tensor> {
        let permuted: Vec<i64> = self.perm.iter().map(|&axis| self.shape[axis as usize]).collect();
        let mut back = vec![0i64; self.perm.len()];
        for (k, &axis) in self.perm.iter().enumerate() {
            back[axis as usize] = k as i64;
        }
        Ok(t.f_reshape(permuted)?.f_permute(back)?)
    }

    /// A tensor of the file as the graph has it, in this shape.
    pub fn for_graph(&self, t: &Tensor, shape: &[i64]) -> Result<Tensor> {
        Ok(t.f_permute(&self.perm[..])?.f_reshape(shape)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn there_and_back_is_the_same_tensor() {
        let file = Tensor::arange(24, (Kind::Float, tch::Device::Cpu)).reshape([2, 3, 4]);
        let stored = StoredLayout { shape: vec![2, 3, 4], perm: vec![2, 0, 1] };
        let layout = FileLayout::new("w", &stored, &[4, 6]).unwrap();
        let graph = layout.for_graph(&file, &[4, 6]).unwrap();
        // Element (k, 3 i + j) of the graph is element (i, j, k) of the file.
        assert_eq!(graph.double_value(&[1, 5]), file.double_value(&[1, 2, 1]));
        assert_eq!(graph.double_value(&[3, 1]), file.double_value(&[0, 1, 3]));
        assert_eq!(layout.for_file(&graph).unwrap(), file);
    }

    #[test]
    fn what_is_no_layout_is_refused() {
        for (shape, perm) in [(vec![2, 3], vec![0, 0]), (vec![2, 3], vec![1]), (vec![2, 4], vec![1, 0])] {
            let e = FileLayout::new("w", &StoredLayout { shape, perm }, &[3, 2]).unwrap_err().to_string();
            assert!(e.contains("`w`") && e.contains("no layout"), "{e}");
        }
    }
}
