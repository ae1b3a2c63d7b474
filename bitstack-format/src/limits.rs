use bitstack_io::safetensors::MAX_HEADER_BYTES;

/// What a file may make its reader use.
///
/// Opening takes at most [`Limits::OPENING_BYTES_PER_HEADER_BYTE`] bytes of memory for each byte of the header, which must be there and
/// within its limit before any of it is read, and 64 KiB. Reading takes the tensor's or block's own bytes, and no tensor is read that the file does
/// not wholly contain; verifying takes the largest block and a buffer of 1 MiB; writing a prefix a new header and that buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of a header. Never above [`MAX_HEADER_BYTES`], its default.
    pub header_bytes: u64,
    /// Most bytes of a single tensor. By default 64 GiB.
    pub tensor_bytes: u64,
}

impl Limits {
    /// The most bytes of memory that opening takes for one byte of the header, as the tests measure it on headers made for the purpose.
    pub const OPENING_BYTES_PER_HEADER_BYTE: u64 = 16;
}

impl Default for Limits {
    fn default() -> Self {
        Self { header_bytes: MAX_HEADER_BYTES, tensor_bytes: 64 << 30 }
    }
}
