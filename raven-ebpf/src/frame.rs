//! Bounds-checked views into an XDP frame: the only module with pointer arithmetic.

use aya_ebpf::programs::XdpContext;

/// Returns a pointer to the `T` at `offset` of the frame, or `None` if the frame is too short.
///
/// `T` must have alignment 1, as all headers of `raven-common` have: frames have no alignment guarantee.
#[inline(always)]
pub fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    const { assert!(align_of::<T>() == 1) };
    let start = ctx.data() + offset;
    (start + size_of::<T>() <= ctx.data_end()).then_some(start as *mut T)
}

/// Copies the `T` at `offset` of the frame. Returns `None` if the frame is too short.
#[inline(always)]
pub fn read<T: Copy>(ctx: &XdpContext, offset: usize) -> Option<T> {
    // SAFETY: `at` checked that all of `T` lies between data and data_end; `T` is a header, valid for any bytes.
    at::<T>(ctx, offset).map(|p| unsafe { *p })
}
