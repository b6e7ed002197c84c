//! Pooling.

use crate::error::Error;
use crate::error::Result;
use crate::graph::Node;
use crate::torch::kernel::{Kernel, one};
use crate::torch::ops::conv::{Window, split_padding};
use crate::torch::registry::Registry;

pub fn register(r: &mut Registry) {
    r.add("GlobalAveragePool", 1, (1, 1), |_| {
        Ok(Kernel::new(|a| {
            let x = a.t(0)?;
            let axes: Vec<i64> = (2..x.dim() as i64).collect();
            one(x.f_mean_dim(&axes[..], true, None)?)
        }))
    });
    r.add("GlobalMaxPool", 1, (1, 1), |_| {
        Ok(Kernel::new(|a| {
            let x = a.t(0)?;
            let axes: Vec<i64> = (2..x.dim() as i64).collect();
            one(x.f_amax(&axes[..], true)?)
        }))
    });
    r.add("AveragePool", 1, (1, 1), average_pool);
}

fn average_pool(node: &Node) -> Result<Kernel> {
    let window = Window::parse(node)?;
    let ceil = node.attributes.flag("ceil_mode", false)?;
    let include = node.attributes.flag("count_include_pad", false)?;
    let kernel = window.kernel.clone().ok_or_else(|| Error::invalid("attribute `kernel_shape` is missing"))?;
    if kernel.len() != 2 || ceil || window.dilations.as_ref().is_some_and(|d| d.iter().any(|&n| n != 1)) {
        return Err(Error::unsupported("average pooling other than 2-D without ceil_mode and dilation"));
    }
    Ok(Kernel::new(move |a| {
        let x = a.t(0)?;
        let pads = window.padding(&x.size()[2..], &kernel)?;
        if pads.iter().any(|(b, e)| b != e) && !include {
            return Err(Error::unsupported("average pooling with uneven padding that is not counted"));
        }
        let (x, padding) = split_padding(x, &pads, 0.0)?;
        one(x.f_avg_pool2d(&kernel[..], &window.strides(2)?[..], &padding[..], false, include, None)?)
    }))
}
