//! DisBack: stage 1 records how the teacher degrades into the initial student, stage 2 distils back along that path.

pub mod checkpoint;
pub mod config;
pub mod draws;
pub mod metrics;
pub mod objective;
pub mod progress;
pub mod rundir;
pub mod trajectory;

pub use config::Config;
pub use rundir::RunDir;
pub use trajectory::Trajectory;
