//! Types that cross the border, and the guard that turns errors and panics into texts.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::slice;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Text {
    data: *const u8,
    size: usize,
}

impl Text {
    /// The caller lends the memory for the duration of the call.
    pub unsafe fn bytes(&self) -> &[u8] {
        if self.size == 0 {
            &[]
        } else {
            slice::from_raw_parts(self.data, self.size)
        }
    }

    pub unsafe fn text(&self) -> Result<&str, String> {
        std::str::from_utf8(self.bytes())
            .map_err(|e| format!("text is not valid UTF-8 at byte {}", e.valid_up_to()))
    }
}

#[repr(C)]
pub struct Array<T> {
    data: *mut T,
    size: usize,
}

impl<T> Array<T> {
    pub fn new(items: Vec<T>) -> Self {
        let boxed = items.into_boxed_slice();
        let size = boxed.len();
        Array {
            data: Box::into_raw(boxed) as *mut T,
            size,
        }
    }

    unsafe fn free(self) {
        if !self.data.is_null() {
            drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(
                self.data, self.size,
            )));
        }
    }
}

pub type Bytes = Array<u8>;
pub type Ids = Array<u32>;

#[no_mangle]
pub unsafe extern "C" fn ptx_bytes_free(bytes: Bytes) {
    bytes.free()
}

#[no_mangle]
pub unsafe extern "C" fn ptx_ids_free(ids: Ids) {
    ids.free()
}

/// Runs `body` and writes its value to `out`, or its error or panic to `error`.
pub unsafe fn guarded<T>(
    out: *mut T,
    error: *mut Bytes,
    body: impl FnOnce() -> Result<T, String>,
) -> bool {
    let message = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => {
            out.write(value);
            return true;
        }
        Ok(Err(message)) => message,
        Err(panic) => {
            let text = panic
                .downcast_ref::<&str>()
                .map(|s| s.to_string())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "unknown panic".to_string());
            format!("internal fault of the text library: {text}")
        }
    };
    error.write(Bytes::new(message.into_bytes()));
    false
}

/// For questions that have a harmless answer.
pub fn answer<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
}
