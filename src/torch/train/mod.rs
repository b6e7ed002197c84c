//! What training needs beside the networks: the optimiser, averages, low-rank adaptation, fresh weights, bf16 storage, recorded
//! steps.

pub mod bf16_storage;
pub mod cuda_graph;
pub mod ema;
pub mod init;
pub mod lora;
pub mod optim;
