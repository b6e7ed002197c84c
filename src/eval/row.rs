//! What is measured of one generated set, as a row of the table.

use serde::{Deserialize, Serialize};

/// Measures of one class.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClassRow {
    /// Number of the class.
    pub class: usize,
    /// Number of generated and of reference images of the class.
    pub images: [usize; 2],
    /// Frechet distance within the class.
    pub frechet: f64,
    /// Kernel distance within the class.
    pub kernel: f64,
    /// Precision within the class; absent where one of the sets has 5 images or fewer.
    pub precision: Option<f64>,
    /// Recall within the class; absent where one of the sets has 5 images or fewer.
    pub recall: Option<f64>,
}

/// Measures of one generated set. Where there are several blocks, means over them; what could not be measured is absent.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluationRow {
    /// Name of the generated set in the table.
    pub name: String,
    /// `student`, `teacher`, `images`, or `values` of what is no image.
    pub kind: String,
    /// Whether the samples were measured by their values: not as images.
    pub by_values: bool,
    /// Frechet distance (Dowson & Landau 1982); the FID where the features are Inception's.
    pub frechet: Option<f64>,
    /// Standard deviation of the Frechet distance over blocks of seeds; absent for one block.
    pub frechet_deviation: Option<f64>,
    /// Lowest Frechet distance of the blocks, as EDM quotes it for three blocks; absent for one block.
    pub frechet_least: Option<f64>,
    /// Kernel distance (Binkowski et al. 2018); the KID where the features are Inception's.
    pub kernel: Option<f64>,
    /// Standard error of the kernel distance: over blocks of seeds, or within the only one.
    pub kernel_standard_error: Option<f64>,
    /// Standard deviation over random subsets, where the kernel distance is their mean.
    pub kernel_deviation: Option<f64>,
    /// Share of the generated images, 0 to 1, within the reference's manifold (Kynkaanniemi et al. 2019): quality.
    pub precision: Option<f64>,
    /// Share of the reference images, 0 to 1, within the generated manifold (Kynkaanniemi et al. 2019): diversity.
    pub recall: Option<f64>,
    /// Density (Naeem et al. 2020), 1 for equal distributions.
    pub density: Option<f64>,
    /// Coverage (Naeem et al. 2020), 0 to 1.
    pub coverage: Option<f64>,
    /// Inception Score (Salimans et al. 2016), 1 or more; absent where the feature network gives no class scores.
    pub inception_score: Option<f64>,
    /// Standard deviation of the Inception Score over ten parts of a block, the mean of all blocks.
    pub inception_score_deviation: Option<f64>,
    /// Sliced Wasserstein distance (Karras et al. 2018) times 1000.
    pub sliced: Option<f64>,
    /// Standard error of `sliced`: over blocks of seeds, or over random directions within the only one.
    pub sliced_standard_error: Option<f64>,
    /// Number of generated images a block, and of reference images.
    pub images: [usize; 2],
    /// Number of blocks of seeds.
    pub blocks: usize,
    /// Number of features an image; absent without a feature network.
    pub features: Option<usize>,
    /// Network evaluations for one image; absent for images that were there already.
    pub nfe: Option<usize>,
    /// Milliseconds to make one image; absent for images that were there already.
    pub ms_per_image: Option<f64>,
    /// Measures class by class; empty where they were not asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassRow>,
    /// What makes the numbers less reliable, such as too few images.
    pub warnings: Vec<String>,
}
