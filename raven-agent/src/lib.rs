//! The agent: one per node. `watch → topology → plan → diff → apply → observe`, each a module, in that order; a library
//! with a thin `main.rs`, so that tests and benchmarks can link it.
//!
//! [`proxy`] is the L7 half, which follows the same topology. Pure: [`topology`], [`plan`], [`diff`]. Drivers, called by [`apply`] alone: [`bpf`], [`link`], [`tunnel`],
//! [`netfilter`]. Around them: [`snapshot`] (the last topology on disk), [`surroundings`] (what is not ours and in the way), [`observe`], [`cleanup`], [`config`], [`names`].

#![forbid(unsafe_code)]

pub mod app;
pub mod apply;
pub mod bpf;
pub mod cleanup;
pub mod config;
pub mod diff;
pub mod link;
pub mod names;
pub mod netfilter;
pub mod observe;
pub mod plan;
pub mod proxy;
pub mod snapshot;
pub mod surroundings;
pub mod topology;
pub mod tunnel;
pub mod watch;
