//! Diffusion models as this project sees them: the teacher card, noise schedules, conversions between predictions,
//! denoisers and samplers. The common coordinate is `x_edm = x_t / a_t = x0 + sigma e` with `sigma = b_t / a_t`.

pub mod card;
mod card_keys;
pub mod card_source;
pub mod condition;
pub mod condition_source;
pub mod conditions;
pub mod conversion;
#[cfg(feature = "train")]
pub mod denoiser;
pub mod fixed;
#[cfg(feature = "train")]
pub mod generator;
pub mod guidance;
mod joined;
#[cfg(feature = "train")]
pub mod loss_weight;
#[cfg(feature = "train")]
pub mod prepared;
pub mod sample_axes;
pub mod sampler;
pub mod schedule;
mod scheduler_config;
pub mod teacher_engine;

pub use card::{InputSpec, Layout, Modality, Prediction, TeacherCard, TimeUnit};
pub use card_source::{CardOrigin, CardSource, ResolvedCard};
pub use condition::{Condition, Null};
pub use condition_source::ConditionSource;
#[cfg(feature = "train")]
pub use conditions::Conditions;
pub use conditions::HostConditions;
pub use conversion::{Coefficients, Conversion, StudentStart};
#[cfg(feature = "train")]
pub use denoiser::Denoiser;
pub use fixed::FixedInput;
#[cfg(feature = "train")]
pub use generator::{Generator, GeneratorNames, GeneratorPorts};
pub use guidance::Guidance;
pub(crate) use guidance::by_itself;
#[cfg(feature = "train")]
pub use prepared::{Form, PreparedLevels};
pub use sampler::{Sampled, Sampler, VectorSpace};
pub use schedule::{Betas, Direction, Schedule, ScheduleSpec};
pub use teacher_engine::{TeacherOnEngine, TeacherRequest, TeacherSamples};
