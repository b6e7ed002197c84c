//! Every rewrite of `graph::raise` alone: values and gradients of inputs and weights against the unraised plan, in f32 and
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
