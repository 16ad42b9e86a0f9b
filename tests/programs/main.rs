//! Tests of each eBPF program: crafted packets go in, and the action, every byte of the result and
//! every counter are compared.
//!
//! [`topology`] defines nodes and prefixes, [`packet`] builds packets (and, independently, the expected results),
//! [`dataplane`] loads the object that the agent embeds and runs a program by `BPF_PROG_TEST_RUN`, [`case`]
//! compares. A test run has no tunnel metadata, redirects or outer headers: these are tested with real devices in
//! two namespaces, by [`testbed`].
//!
//! One module per program follows, and [`mutations`] and [`verifier`] for all of them. Nothing is pinned, so tests are independent.

#![forbid(unsafe_code)]

mod case;
mod dataplane;
mod guard;
mod mutations;
mod overlay_egress;
mod overlay_ingress;
mod packet;
mod testbed;
mod topology;
mod tunnel_egress;
mod tunnel_ingress;
mod uplink_ingress;
mod uplink_xdp;
mod verifier;
