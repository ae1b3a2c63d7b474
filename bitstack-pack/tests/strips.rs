//! Strips: the same matrix, in another order of bytes.
#![expect(clippy::print_stdout, reason = "a test that cannot run here says so")]

use bitstack_pack::{Isa, PackError, STRIP_ROWS, SignLayout, SignMatrix, SignView, row_bytes, to_strips_at};

const ROWS: &[usize] = if cfg!(miri) { &[0, 1, 17] } else { &[0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 70] };
const COLS: &[usize] = if cfg!(miri) {
    &[0, 9, 33]
} else {
    &[0, 1, 8, 9, 24, 25, 31, 32, 33, 64, 100, 511, 512, 513, 520, 1024, 1031, 2080]
};

/// Signs whose period is prime.
fn painted(rows: usize, cols: usize) -> SignMatrix {
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * i + 5 * i) % 61) as f32 - 30.5).collect();
    SignMatrix::from_f32(rows, cols, &values).unwrap()
}

fn for_each_case(check: impl Fn(Isa, &SignMatrix, &[u8])) {
    for isa in Isa::ALL {
        if !isa.is_available() {
            println!("skipped: {isa}, because this CPU (or Miri) does not have its instructions");
            continue;
        }
        for &rows in ROWS {
            for &cols in COLS {
                let matrix = painted(rows, cols);
                let mut strips = matrix.as_bytes().to_vec();
                to_strips_at(isa, rows, cols, &mut strips).unwrap();
                check(isa, &matrix, &strips);
            }
        }
    }
}

/// Straight from the definition: strip after strip, 4 bytes after 4 bytes, row after row.
fn in_strips(matrix: &SignMatrix) -> Vec<u8> {
    let len = row_bytes(matrix.cols());
    let mut strips = Vec::new();
    for first_row in (0..matrix.rows()).step_by(STRIP_ROWS) {
        for first_byte in (0..len).step_by(4) {
            for row in first_row..matrix.rows().min(first_row + STRIP_ROWS) {
                strips.extend_from_slice(&matrix.view().row(row)[first_byte..len.min(first_byte + 4)]);
            }
        }
    }
    strips
}

#[test]
fn bytes_are_where_the_definition_says() {
    for_each_case(|isa, matrix, strips| {
        assert_eq!(strips, in_strips(matrix), "{isa}, {} x {}", matrix.rows(), matrix.cols());
    });
}

#[test]
fn strips_are_the_same_matrix() {
    for_each_case(|isa, matrix, strips| {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let view = SignView::with_layout(rows, cols, SignLayout::Strips, strips).unwrap();
        assert_eq!((view.rows(), view.cols(), view.layout()), (rows, cols, SignLayout::Strips));
        assert_eq!(view.to_owned(), *matrix);
        assert_eq!(view.to_reference_bytes(), matrix.view().to_reference_bytes());
        let unpacked = matrix.view().unpack().unwrap();
        let mut values = vec![0.0; rows * cols];
        view.unpack_into_at(isa, &mut values).unwrap();
        assert_eq!(values, unpacked);
        for row in 0..rows {
            assert_eq!(view.row(row), matrix.view().row(row));
            let mut values = vec![1.0; cols];
            view.apply_row_at(isa, row, &mut values);
            assert_eq!(values, unpacked[row * cols..][..cols]);
            for first_byte in [0, row_bytes(cols) / 3, row_bytes(cols)] {
                let mut bytes = vec![0; row_bytes(cols) - first_byte];
                view.copy_row(row, first_byte, &mut bytes);
                assert_eq!(bytes, matrix.view().row(row)[first_byte..]);
            }
            for col in (0..cols).step_by(7) {
                assert_eq!(view.get(row, col), unpacked[row * cols + col]);
            }
        }
    });
}

#[test]
fn lines_are_the_same_from_both_layouts_and_zero_beyond_the_matrix() {
    for_each_case(|isa, matrix, strips| {
        let (rows, cols, len) = (matrix.rows(), matrix.cols(), row_bytes(matrix.cols()));
        let in_strips = SignView::with_layout(rows, cols, SignLayout::Strips, strips).unwrap();
        for strip in 0..rows.div_ceil(STRIP_ROWS) {
            for (first_line, n) in [(0, 1), (0, len.div_ceil(4) + 2), (len / 8, 17), (len, 1)] {
                let mut expected = vec![[0; 64]; n];
                for (line, first_byte) in expected.iter_mut().zip((4 * first_line..).step_by(4)) {
                    for (i, byte) in line.iter_mut().enumerate() {
                        let (row, at) = (STRIP_ROWS * strip + i / 4, first_byte + i % 4);
                        *byte = if row < rows && at < len { matrix.view().row(row)[at] } else { 0 };
                    }
                }
                for view in [matrix.view(), in_strips] {
                    let mut lines = vec![[0xa5; 64]; n];
                    view.copy_lines_at(isa, strip, first_line, &mut lines);
                    assert_eq!(lines, expected, "{isa}, {rows} x {cols}, strip {strip}, {n} lines from {first_line}");
                }
                if let Some(lines) = in_strips.strip_lines(strip) {
                    let there = n.min(lines.len().saturating_sub(first_line));
                    assert_eq!(
                        lines.iter().skip(first_line).take(n).collect::<Vec<_>>(),
                        expected[..there].iter().collect::<Vec<_>>()
                    );
                    assert_eq!(lines.len(), len / 4);
                }
            }
        }
    });
}

#[test]
fn wrong_lengths_and_stray_bits_are_found_in_strips_as_well() {
    let expected = PackError::Length { what: "bytes", rows: 17, cols: 9, expected: 34, actual: 33 };
    assert_eq!(SignView::with_layout(17, 9, SignLayout::Strips, &[0; 33]), Err(expected.clone()));
    let mut bytes = [0xff; 33];
    assert_eq!(to_strips_at(Isa::detect(), 17, 9, &mut bytes), Err(expected));
    assert_eq!(bytes, [0xff; 33]);
    for row in 0..17 {
        // One unit of 2 bytes a row: the second one has the ninth column.
        let mut strips = vec![0; 34];
        strips[2 * row + 1] = 0b11;
        let view = SignView::with_layout(17, 9, SignLayout::Strips, &strips);
        assert_eq!(view, Err(PackError::TailBits { row, cols: 9 }));
        strips[2 * row + 1] = 0b01;
        assert_eq!(SignView::with_layout(17, 9, SignLayout::Strips, &strips).unwrap().get(row, 8), 1.0);
    }
}
