//! The ONNX model in memory: loading and saving, a typed graph, the roles of its tensors, fusing of decomposed operators.

pub mod attributes;
pub mod calls;
pub mod definition;
pub mod depth;
pub mod edit;
pub mod fuse;
pub mod inline;
pub mod ir;
pub mod load;
pub mod lower;
pub mod narrow;
pub mod op_schema;
pub mod pass;
pub mod quantised;
pub mod roles;
pub mod save;
pub mod sizes;
pub mod subgraphs;
pub mod tensors;
pub mod unguarded_division;
pub mod widen;

pub use attributes::{Attribute, Attributes};
pub use definition::Definition;
pub use ir::{Consumers, Graph, Node, Port, Producers, ValueId};
pub use load::Model;
pub use roles::{Role, TrainableChoice};
pub use sizes::Sizes;
