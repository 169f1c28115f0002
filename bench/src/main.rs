//! The evaluation.
fn main() {}
