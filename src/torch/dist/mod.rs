//! Several processes that train one network: who they are ([`launcher`]), what they tell each other ([`World`]), and the sum of their
//! gradients ([`Reducer`]). The engine is libtorch's c10d, through `dist.cpp`.

mod group;
pub mod launcher;
mod owners;
mod reducer;
mod world;

pub use group::has_nccl;
pub use owners::{Named, Owners, largest_share};
pub use reducer::{BUCKET, Reducer};
pub use world::World;
