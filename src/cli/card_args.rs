//! What the command line says about a teacher's card.

use clap::Args;

/// The options that speak of the card.
#[derive(Debug, Clone, Default, Args)]
pub struct CardArgs {
    /// A value of the teacher card, as in prediction=epsilon; wins over the side file and the model's metadata.
    #[arg(long = "card", value_name = "KEY=VALUE")]
    pub card: Vec<String>,
    /// Size of a dimension that the teacher's file leaves free, by its name, as in sequence=77 (the same as
    /// --card dims.sequence=77). The shapes of the sample and of the conditions need not be given.
    #[arg(long = "dim", value_name = "NAME=N")]
    pub dims: Vec<String>,
}

impl CardArgs {
    /// All of it as `key=value` of the card.
    pub fn overrides(&self) -> Vec<String> {
        let dims = self.dims.iter().map(|d| format!("dims.{d}"));
        self.card.iter().cloned().chain(dims).collect()
    }

    /// Whether the command line says nothing about the card.
    pub fn is_empty(&self) -> bool {
        self.card.is_empty() && self.dims.is_empty()
    }
}
