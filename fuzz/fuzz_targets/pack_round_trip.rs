//! Packing signs and unpacking them gives the signs back; packed bytes are taken exactly when their length is right and their padding
//! is zero, and conversion to the other bit order and back is the identity.
#![no_main]

use bitstack_pack::{SignMatrix, SignView, row_bytes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u16, &[u8])| {
    let (rows, cols, bytes) = (usize::from(input.0 % 16), usize::from(input.1 % 600), input.2);

    // Any bits are floats, NaNs and zeros of both signs among them.
    let mut values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    assert_eq!(SignMatrix::from_f32(rows, cols, &values).is_ok(), values.len() == rows * cols);
    values.resize(rows * cols, 0.0);
    let matrix = SignMatrix::from_f32(rows, cols, &values).expect("the length is right");
    let mut row = vec![0.0; cols];
    for r in 0..rows {
        matrix.view().unpack_row_into(r, &mut row);
        for (c, &sign) in row.iter().enumerate() {
            let x = values[r * cols + c];
            assert_eq!(sign, matrix.view().get(r, c));
            assert!(x.is_nan() || sign == if x < 0.0 { -1.0 } else { 1.0 }, "the sign of {x} is {sign}");
        }
    }
    let signs: Vec<f32> =
        (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))).map(|(r, c)| matrix.view().get(r, c)).collect();
    assert_eq!(SignMatrix::from_f32(rows, cols, &signs).as_ref(), Ok(&matrix));
    assert_eq!(SignMatrix::from_bytes(rows, cols, matrix.as_bytes().to_vec()).as_ref(), Ok(&matrix));
    let other_order = matrix.view().to_reference_bytes();
    assert_eq!(SignMatrix::from_reference_bytes(rows, cols, &other_order).as_ref(), Ok(&matrix));

    let n_row = row_bytes(cols);
    let padding_is_zero = || cols % 8 == 0 || bytes.chunks_exact(n_row).all(|row| row[n_row - 1] >> (cols % 8) == 0);
    let valid = bytes.len() == rows * n_row && padding_is_zero();
    assert_eq!(SignView::new(rows, cols, bytes).is_ok(), valid);
});
