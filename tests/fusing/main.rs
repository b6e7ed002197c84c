//! Every rewrite of `graph::fuse` alone: values and gradients of inputs and weights against the unfused plan, in f32 and
//! f64, and the reasons of what is left as it was.

mod activations;
mod attention;
mod cse;
mod elementwise;
mod frameworks;
mod graphs;
mod layers;
mod layout;
mod norms;
mod transposes;
