//! Each eBPF program by itself: crafted packets in, and the action, every byte of what comes out and every counter
//! compared.
//!
//! [`world`] says who lives where, [`packet`] builds packets (and, from scratch, what they must become), [`dataplane`]
//! loads the object that the agent embeds and runs a program by `BPF_PROG_TEST_RUN`, [`case`] compares. What a test run
//! cannot show (tunnel metadata, redirects, the outer header) is shown on real devices in two namespaces: [`wire`].
//!
//! Then one module per program, and [`garbage`] for all of them. Nothing is pinned: tests do not see each other.

#![forbid(unsafe_code)]

mod case;
mod dataplane;
mod garbage;
mod guard;
mod overlay_egress;
mod overlay_ingress;
mod packet;
mod tunnel_egress;
mod tunnel_ingress;
mod uplink_ingress;
mod uplink_xdp;
mod wire;
mod world;
