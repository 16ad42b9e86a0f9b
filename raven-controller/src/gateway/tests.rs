//! Laws of [`decide`](super::decide), case by case and by property.

mod build;
mod cases;
mod laws;
mod links;
