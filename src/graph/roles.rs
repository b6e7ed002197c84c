pub enum Role {A} pub struct TrainableChoice;
