//! Raven's eBPF programs: the entry points. Each one translates the decision of its module into the kernel's action
//! and counts the packet.
//!
//! A packet passes the modules in this order: [`mod@overlay_egress`] on a member → [`mod@uplink_xdp`] and
//! [`mod@uplink_ingress`] on its gateway node (or [`mod@overlay_ingress`], the fallback tier) → WireGuard →
//! [`mod@tunnel_ingress`] on the other pool's gateway node → [`mod@overlay_ingress`] on the node that has the
//! destination. [`mod@kubelet_lookup`] belongs to the L7 half.
//!
//! The object's license is Dual MIT/GPL, which GPL-only helpers require. All programs load on Linux 5.10.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key passed by value is copied to the 512-byte stack once more (aya #1626)"
)]
#![allow(unreachable_pub, missing_docs, reason = "a program has no users; entry points are exported by aya's macros")]

mod count;
mod forward;
mod frame;
mod guard;
mod kubelet_lookup;
mod maps;
mod overlay_egress;
mod overlay_ingress;
mod parse;
mod rewrite;
#[cfg(target_arch = "bpf")]
mod runtime;
mod sample;
mod tunnel_egress;
mod tunnel_ingress;
mod uplink_ingress;
mod uplink_xdp;

use aya_ebpf::{
    bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    macros::{classifier, sk_lookup, xdp},
    programs::{SkLookupContext, TcContext, XdpContext},
};
use raven_common::{Verdict, header::ETH_LEN};

use crate::{count::Decision, parse::Skb};

/// Returns the kernel's action for a verdict. Redirect helpers have been called before;
/// they always return TC_ACT_REDIRECT.
#[inline(always)]
fn action(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::ToTunnelFast
        | Verdict::ToTunnel
        | Verdict::ToOverlay
        | Verdict::ToOverlayKey
        | Verdict::Relayed
        | Verdict::FromMember
        | Verdict::ToMember => TC_ACT_REDIRECT,
        Verdict::Multicast => TC_ACT_SHOT,
        v if v.is_drop() => TC_ACT_SHOT,
        // Programs of other owners that are attached behind this one still receive the packet.
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn finish(skb: &Skb, l3: usize, size: Size, decision: Result<Decision, Decision>) -> i32 {
    let decision = match decision {
        Ok(decision) | Err(decision) => decision,
    };
    count::add(decision, size.packets, size.bytes);
    #[cfg(feature = "trace")]
    aya_log_ebpf::info!(
        &skb.ctx,
        "verdict {} gateway {} len {}",
        decision.verdict as u32,
        decision.gateway,
        size.bytes
    );
    if decision.verdict.is_drop() {
        sample::skb(skb, decision, l3);
    }
    action(decision.verdict)
}

/// Size to count, taken before a program changes the packet.
#[derive(Clone, Copy)]
struct Size {
    packets: u64,
    bytes: u64,
}

impl Size {
    #[inline(always)]
    fn of(skb: &Skb) -> Self {
        Self { packets: skb.segments() as u64, bytes: skb.len() as u64 }
    }
}

/// TC egress of `raven0`. Since Linux 5.10. Packets redirected here by a gateway node's program are already counted.
#[classifier]
pub fn overlay_egress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    match overlay_egress::run(&skb) {
        Some(decision) => finish(&skb, ETH_LEN, size, decision),
        None => TC_ACT_UNSPEC,
    }
}

/// TC ingress of `raven0` on all nodes. Since Linux 5.10.
#[classifier]
pub fn overlay_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    finish(&skb, ETH_LEN, size, overlay_ingress::run(&skb))
}

/// TC ingress of the uplink of a node with a tunnel. Since Linux 5.10. Does not count packets of other programs.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    match uplink_ingress::run(&skb) {
        Some(decision) => finish(&skb, ETH_LEN, size, decision),
        None => TC_ACT_UNSPEC,
    }
}

/// TC ingress of `raven-wg0`. Since Linux 5.10.
#[classifier]
pub fn tunnel_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    finish(&skb, 0, size, tunnel_ingress::run(&skb))
}

/// TC egress of `raven-wg0`. Since Linux 5.10. Packets redirected here are already counted.
#[classifier]
pub fn tunnel_egress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    match tunnel_egress::run(&skb) {
        Some(decision) => finish(&skb, 0, size, decision),
        None => TC_ACT_UNSPEC,
    }
}

/// Native XDP of the uplink of a node with a tunnel. Since Linux 5.10.
#[xdp]
pub fn uplink_xdp(ctx: XdpContext) -> u32 {
    match uplink_xdp::run(&ctx) {
        Some(decision) => {
            count::add(decision, 1, (ctx.data_end() - ctx.data()) as u64);
            sample::xdp(&ctx, decision);
            xdp_action::XDP_DROP
        }
        None => xdp_action::XDP_PASS,
    }
}

/// sk_lookup of the node's network namespace on cloud gateway nodes. Since Linux 5.9.
#[sk_lookup]
pub fn kubelet_lookup(ctx: SkLookupContext) -> u32 {
    kubelet_lookup::run(&ctx)
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
