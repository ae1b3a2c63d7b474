//! The flat layout of the published implementation, against a transcription of its definition.

use bitstack_pack::{PackError, SignMatrix};

/// Bit `i` of the flattened matrix is bit `7 - i % 8` of byte `i / 8`, zeros at the end.
fn naive_reference(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len().div_ceil(8)];
    for (i, &value) in values.iter().enumerate() {
        bytes[i / 8] |= u8::from(value >= 0.0) << (7 - i % 8);
    }
    bytes
}

fn painted(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * i + 3 * i) % 61) as f32 - 30.0).collect()
}

#[test]
fn conversion_matches_the_definition_both_ways() {
    for cols in 0..35 {
        for rows in 0..if cfg!(miri) { 4 } else { 20 } {
            let values = painted(rows * cols);
            let flat = naive_reference(&values);
            let signs = SignMatrix::from_f32(rows, cols, &values).unwrap();
            assert_eq!(signs.view().to_reference_bytes(), flat, "{rows} x {cols}");
            assert_eq!(SignMatrix::from_reference_bytes(rows, cols, &flat).unwrap(), signs, "{rows} x {cols}");
        }
    }
}

#[test]
fn the_first_element_is_the_most_significant_bit() {
    // Rows + - - and - + +, of three columns: 100 011, then two zero bits.
    let signs = SignMatrix::from_reference_bytes(2, 3, &[0b1000_1100]).unwrap();
    assert_eq!(signs.as_bytes(), [0b001, 0b110]);
    assert_eq!(signs.view().unpack().unwrap(), [1.0, -1.0, -1.0, -1.0, 1.0, 1.0]);
    assert_eq!(signs.view().to_reference_bytes(), [0b1000_1100]);
}

#[test]
fn set_fill_bits_are_rejected() {
    assert_eq!(SignMatrix::from_reference_bytes(2, 3, &[0b1000_1101]), Err(PackError::TailBits { row: 1, cols: 3 }));
    // The same shape of bits in whole bytes has no fill bits.
    assert!(SignMatrix::from_reference_bytes(2, 4, &[0xff]).is_ok());
}

#[test]
fn another_length_is_rejected() {
    for len in [0, 1, 3] {
        assert_eq!(
            SignMatrix::from_reference_bytes(3, 5, &vec![0; len]),
            Err(PackError::Length { what: "bytes", rows: 3, cols: 5, expected: 2, actual: len })
        );
    }
}

#[test]
fn an_impossible_shape_is_rejected_before_it_is_allocated() {
    let (rows, cols) = (usize::MAX / 2, 3);
    assert_eq!(SignMatrix::from_reference_bytes(rows, cols, &[0]), Err(PackError::TooLarge { rows, cols }));
    assert!(matches!(
        SignMatrix::from_reference_bytes(1 << (usize::BITS - 16), 1000, &[0]),
        Err(PackError::Length { .. })
    ));
}
