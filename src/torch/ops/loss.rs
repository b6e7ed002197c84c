//! Losses, as graphs exported for training hold them.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::graph::Node;
use crate::torch::exec::kernel::{Kernel, Value, one};
use crate::torch::exec::registry::Registry;

pub fn register(r: &mut Registry) {
    r.add("NegativeLogLikelihoodLoss", 12, (2, 3), |n| {
        let spec = Spec::parse(n)?;
        Ok(Kernel::new(move |a| one(spec.loss(a.t(0)?, a.t(1)?, a.opt(2)?)?)))
    });
    r.add("SoftmaxCrossEntropyLoss", 12, (2, 3), |n| {
        let spec = Spec::parse(n)?;
        Ok(Kernel::new(move |a| {
            let scores = a.t(0)?.f_log_softmax(1, None)?;
            Ok(vec![Value::device(spec.loss(&scores, a.t(1)?, a.opt(2)?)?), Value::device(scores)])
        }))
    });
}

#[derive(Debug, Clone, Copy)]
enum Reduction {
    None,
    Sum,
    Mean,
}

struct Spec {
    reduction: Reduction,
    ignored: Option<i64>,
}

impl Spec {
    fn parse(node: &Node) -> Result<Self> {
        let reduction = match node.attributes.string_or("reduction", "mean")?.as_str() {
            "none" => Reduction::None,
            "sum" => Reduction::Sum,
            "mean" => Reduction::Mean,
            other => return Err(Error::invalid(format!("attribute `reduction` is `{other}`"))),
        };
        Ok(Self { reduction, ignored: node.attributes.int("ignore_index")? })
    }

    /// -weight[label] * log p[label] at every position; the mean is over the weights.
    fn loss(&self, log_p: &Tensor, labels: &Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
        if log_p.dim() < 2 || labels.dim() + 1 != log_p.dim() {
            return Err(Error::invalid(format!(
                "labels of shape {:?} for scores of shape {:?}",
                labels.size(),
                log_p.size()
            )));
        }
        let labels = labels.f_to_kind(tch::Kind::Int64)?;
        let counted = match self.ignored {
            Some(i) => Some(labels.f_ne(i)?),
            None => None,
        };
        // An ignored label may be no class at all.
        let safe = match &counted {
            Some(c) => labels.f_where_self(c, &labels.f_zeros_like()?)?,
            None => labels,
        };
        let picked = log_p.f_gather(1, &safe.f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?.f_neg()?;
        let mut weights = match weight {
            Some(w) => Some(w.f_index_select(0, &safe.f_reshape([-1])?)?.f_reshape(&safe.size()[..])?),
            None => None,
        };
        if let Some(c) = counted {
            let c = c.f_to_kind(picked.kind())?;
            weights = Some(match weights {
                Some(w) => w.f_mul(&c)?,
                None => c,
            });
        }
        let losses = match &weights {
            Some(w) => picked.f_mul(w)?,
            None => picked,
        };
        Ok(match (self.reduction, weights) {
            (Reduction::None, _) => losses,
            (Reduction::Sum, _) => losses.f_sum(losses.kind())?,
            (Reduction::Mean, None) => losses.f_mean(losses.kind())?,
            (Reduction::Mean, Some(w)) => losses.f_sum(losses.kind())?.f_div(&w.f_sum(w.kind())?)?,
        })
    }
}
