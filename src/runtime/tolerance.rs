//! How far two computations of the same student may lie apart.

/// Agreement by precision: what rounding alone makes of a value of order 1.
pub fn of(precision: &str) -> f64 {
    match precision {
        "fp16" => 2e-2,
        "bf16" => 2e-1,
        // Where two engines round an activation to different sides, a step of 8 bits lies between them.
        "int8-dynamic" => 2e-2,
        // Weights are 8-bit, arithmetic is f32: engines agree as in f32. Against the run's weights it is the limit of export.
        _ => 1e-4,
    }
}
