//! Tests of [`decide`](super::decide): examples and properties.

mod addresses;
mod agents;
mod build;
mod cases;
mod exposure;
mod laws;
mod links;
mod published;
mod rules;
