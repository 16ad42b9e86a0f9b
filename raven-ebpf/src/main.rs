//! Raven's eBPF programs: entry points. Each translates what its module decided into the kernel's action and counts it;
//! nothing else happens here.
//!
//! The way of a packet, in the order of the modules: [`overlay_egress`] on an ordinary node → [`uplink_xdp`] and
//! [`uplink_ingress`] on its gateway node (or [`overlay_ingress`], the fallback tier) → WireGuard → [`tunnel_ingress`]
//! on the other pool's gateway node → [`overlay_ingress`] on the node that has the destination. [`kubelet_lookup`] is the L7 half's.
//!
//! Licence of the object: Dual MIT/GPL, as GPL-only helpers ask. All programs load on Linux 5.10.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(clippy::needless_borrows_for_generic_args, reason = "a key by value is copied to the 512-byte stack once more (aya #1626)")]

mod access;
mod count;
mod forward;
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

use crate::{count::Seen, parse::Skb};

/// The kernel's action for a verdict. `redirect` helpers were called by then; their answer is always this constant.
#[inline(always)]
fn action(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::ToTunnelFast | Verdict::ToTunnel | Verdict::ToOverlay | Verdict::ToOverlayKey | Verdict::Relayed => TC_ACT_REDIRECT,
        Verdict::Multicast => TC_ACT_SHOT,
        v if v.is_drop() => TC_ACT_SHOT,
        // "Next, please": another owner's program behind ours still sees the packet.
        _ => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn finish(skb: &Skb, l3: usize, size: Size, seen: Result<Seen, Seen>) -> i32 {
    let seen = match seen {
        Ok(seen) | Err(seen) => seen,
    };
    count::add(seen, size.packets, size.bytes);
    #[cfg(feature = "trace")]
    aya_log_ebpf::info!(&skb.ctx, "verdict {} gateway {} len {}", seen.verdict as u32, seen.gateway, size.bytes);
    if seen.verdict.is_drop() {
        sample::skb(skb, seen, l3);
    }
    action(seen.verdict)
}

/// What is counted: taken before a program changes the packet.
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

/// TC egress of `raven0`. Since Linux 5.10. Silent about what a gateway node's redirect sent here: it is counted already.
#[classifier]
pub fn overlay_egress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    match overlay_egress::run(&skb) {
        Some(seen) => finish(&skb, ETH_LEN, size, seen),
        None => TC_ACT_UNSPEC,
    }
}

/// TC ingress of `raven0`, all nodes. Since Linux 5.10.
#[classifier]
pub fn overlay_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    finish(&skb, ETH_LEN, size, overlay_ingress::run(&skb))
}

/// TC ingress of a gateway node's uplink. Since Linux 5.10. Silent about packets that are not ours.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    match uplink_ingress::run(&skb) {
        Some(seen) => finish(&skb, ETH_LEN, size, seen),
        None => TC_ACT_UNSPEC,
    }
}

/// TC ingress of `raven-wg0`, gateway nodes. Since Linux 5.10.
#[classifier]
pub fn tunnel_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    finish(&skb, 0, size, tunnel_ingress::run(&skb))
}

/// TC egress of `raven-wg0`, gateway nodes. Since Linux 5.10. Silent about what a redirect sent here: it is counted already.
#[classifier]
pub fn tunnel_egress(ctx: TcContext) -> i32 {
    let skb = Skb::new(ctx);
    let size = Size::of(&skb);
    match tunnel_egress::run(&skb) {
        Some(seen) => finish(&skb, 0, size, seen),
        None => TC_ACT_UNSPEC,
    }
}

/// Native XDP of a gateway node's uplink. Since Linux 5.10.
#[xdp]
pub fn uplink_xdp(ctx: XdpContext) -> u32 {
    match uplink_xdp::run(&ctx) {
        Some(seen) => {
            count::add(seen, 1, (ctx.data_end() - ctx.data()) as u64);
            sample::xdp(&ctx, seen);
            xdp_action::XDP_DROP
        }
        None => xdp_action::XDP_PASS,
    }
}

/// sk_lookup of the node's network namespace, cloud gateway nodes. Since Linux 5.9.
#[sk_lookup]
pub fn kubelet_lookup(ctx: SkLookupContext) -> u32 {
    kubelet_lookup::run(&ctx)
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
