//! The only pointer arithmetic: bounds-checked views into an XDP frame.

use aya_ebpf::programs::XdpContext;

/// A pointer to the `T` at `offset` of the frame, if all of it is there.
///
/// `T` must have alignment 1 (all headers of `raven-common` have): frames are aligned to nothing.
#[inline(always)]
pub fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    const { assert!(align_of::<T>() == 1) };
    let start = ctx.data() + offset;
    (start + size_of::<T>() <= ctx.data_end()).then_some(start as *mut T)
}

/// A copy of the `T` at `offset` of the frame.
#[inline(always)]
pub fn read<T: Copy>(ctx: &XdpContext, offset: usize) -> Option<T> {
    // SAFETY: `at` checked that all of `T` lies between data and data_end; `T` is a header, valid for any bytes.
    at::<T>(ctx, offset).map(|p| unsafe { *p })
}
