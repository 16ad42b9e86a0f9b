//! Programs of benchmarks and tests, and of nothing else: a packet generator, a sink, a neighbour. Not in the agent's object.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
#[path = "../runtime.rs"]
mod runtime;

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    btf_maps::{Array, PerCpuArray},
    helpers::bpf_redirect,
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use raven_common::{
    checksum,
    generator::{FRAME_LEN, Generator},
};

/// What to send. Written before a run, read by the generator.
#[btf_map]
static GENERATOR: Array<Generator, 1> = Array::new();

/// How many frames this CPU has made.
#[btf_map]
static SENT: PerCpuArray<u64, 1> = PerCpuArray::new();

/// How many frames arrived, per CPU.
#[btf_map]
static ARRIVED: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Adds one to a counter of this CPU; gives what it was.
#[inline(always)]
fn count(map: &PerCpuArray<u64, 1>) -> u64 {
    let Some(value) = map.get_ptr_mut(0) else { return 0 };
    // SAFETY: this CPU's own value, which always exists.
    unsafe {
        let before = *value;
        *value = before + 1;
        before
    }
}

/// Makes each frame that `BPF_PROG_TEST_RUN` hands in anew (the pages come back as the last receiver left them), with the
/// next of the addresses in turn, and sends it out of a device. Since Linux 5.18 (live frames).
#[xdp]
pub fn generate(ctx: XdpContext) -> u32 {
    let Some(generator) = GENERATOR.get(0) else { return xdp_action::XDP_ABORTED };
    let start = ctx.data();
    if start + FRAME_LEN > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    // Never zero, or there would be a panic to call.
    let turn = (count(&SENT) % u64::from(generator.addresses.max(1))) as u32;
    let address = u32::from_be_bytes(generator.base) + turn * generator.stride;
    let [high, low] = [(address >> 16) as u16, address as u16];
    let [base_high, base_low] =
        [u16::from_be_bytes([generator.base[0], generator.base[1]]), u16::from_be_bytes([generator.base[2], generator.base[3]])];
    let sum = checksum::update(checksum::update(generator.checksum as u16, base_high, high), base_low, low);
    let (at, sum_at) = (generator.address_at as usize & 0x7f, generator.checksum_at as usize & 0x7f);
    if start + at + 4 > ctx.data_end() || start + sum_at + 2 > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: all of FRAME_LEN was checked to lie in the frame, and both fields again at their own offsets. Live frames
    // start at a multiple of 4, and so does the template in the map's value.
    unsafe {
        // Word by word: as one assignment it would be a call to memcpy, which is not there.
        let frame = generator.frame.as_ptr().cast::<u32>();
        for word in 0..FRAME_LEN / 4 {
            (start as *mut u32).add(word).write_volatile(frame.add(word).read_volatile());
        }
        *((start + at) as *mut [u8; 4]) = address.to_be_bytes();
        *((start + sum_at) as *mut [u8; 2]) = sum.to_be_bytes();
        bpf_redirect(generator.ifindex, 0) as u32
    }
}

/// Lets a frame pass: what a veth wants its peer to have before it takes frames from XDP.
#[xdp]
pub fn pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Counts and drops, in TC: where WireGuard or the network card would take the packet; or to measure what comes before.
#[classifier]
pub fn swallow(_ctx: TcContext) -> i32 {
    count(&ARRIVED);
    TC_ACT_SHOT
}

/// Lets every packet pass and lets nobody behind it see one, in TC: as Cilium's programs do.
#[classifier]
pub fn last_word(_ctx: TcContext) -> i32 {
    TC_ACT_OK
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
