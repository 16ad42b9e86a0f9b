//! The agent, one per node. Data flows `watch → topology → plan → diff → apply → observe`, one module each, in that
//! order. A library with a thin `main.rs`, so that tests and benchmarks can link it.
//!
//! - Pure: [`topology`], [`plan`] (for L3 and L7), [`diff`]. They share [`state`], the kernel's state as plain data.
//! - Drivers, each of which reads and changes one part of the kernel: [`bpf`], [`link`], [`tunnel`], [`netfilter`],
//!   [`conntrack`]. [`apply`] runs them; [`cleanup`] uses them to remove everything.
//! - The L7 half: [`proxy`], which follows the L7 part of the plan.
//! - Around them: [`api_client`], [`snapshot`] (the last topology on disk, written by [`atomic_file`]), [`surroundings`] (what other
//!   programs do to Raven's packets), [`leftovers`] (of OpenYurt's Raven), [`boot`] (a unit on
//!   the host), [`observe`] (status, metrics, health), [`config`], [`names`].

#![forbid(unsafe_code)]

pub mod api_client;
pub mod app;
pub mod apply;
pub mod atomic_file;
pub mod boot;
pub mod bpf;
pub mod cleanup;
pub mod config;
pub mod conntrack;
pub mod diff;
pub mod leftovers;
pub mod link;
pub mod names;
pub mod netfilter;
mod nfnetlink;
mod nft;
pub mod observe;
pub mod plan;
pub mod proxy;
pub mod resolve;
pub mod snapshot;
pub mod state;
pub mod surroundings;
pub mod topology;
pub mod tunnel;
pub mod watch;
